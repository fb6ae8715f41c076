// Tokens as prompt.cuh says.
#include "prompt.cuh"

namespace qk {

struct Arrange {  // ArrangeStruct of kernels/cuda/calls.py
  const uint4* x;  // (tokens, k) of 16 bits, k a multiple of 16
  uint4* out;      // (ceil(tokens / 128), steps, 128 tokens, 8 pieces), zeros beyond tokens and columns
  int32_t tokens, k;
};

// A thread per token and half step: 32 neighbouring columns, four pieces of 16 bytes, whose words change places.
__global__ void __launch_bounds__(256) arrange(Arrange a) {
  const int steps = (a.k + kStep - 1) / kStep, halves = 2 * steps;
  const int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const int half = int(at % halves), token = int(at / halves), columns = a.k - half * 32;
  if (token >= (a.tokens + kPromptTokens - 1) / kPromptTokens * kPromptTokens) return;
  alignas(16) uint32_t words[4][4] = {};  // [t][pair of columns]
  for (int t = 0; t < 4; ++t)
    if (token < a.tokens && 8 * t < columns)
      *reinterpret_cast<uint4*>(words[t]) = a.x[(int64_t(token) * a.k + half * 32) / 8 + t];
  uint4* out = a.out + ((int64_t(token / kPromptTokens) * steps + half / 2) * kPromptTokens + token % kPromptTokens) * 8;
  for (int pair = 0; pair < 4; ++pair) {  // product pair / 2 of the half step, its columns' first or last half
    const int piece = half % 2 * 4 + pair;
    out[piece ^ (token & 7)] = {words[0][pair], words[1][pair], words[2][pair], words[3][pair]};
  }
}

}  // namespace qk

QK_API int qk_arrange(const qk::Arrange* a, void* stream) {
  if (a->tokens == 0) return 0;
  const int64_t tokens = (a->tokens + qk::kPromptTokens - 1) / qk::kPromptTokens * qk::kPromptTokens;
  const int64_t threads = tokens * ((a->k + qk::kStep - 1) / qk::kStep) * 2;
  return qk::launch(qk::arrange, dim3(unsigned((threads + 255) / 256)), 256, 0, stream, *a);
}

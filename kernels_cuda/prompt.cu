// y = x @ w.T (+ bias) for many tokens on Hopper: codes become floats in registers, on their way to the tensor cores.
//
// - A block is two groups of four warps; a group multiplies one tile of 64 rows with 128 tokens (wgmma: the weight is the operand
//   from registers, whose fragments are those of mma's, so weights lie as decoding reads them).
// - A code becomes (code - zero_point) * scale in float32, rounded once to T, as kernels/expand.cu writes it: what a dense product
//   of an expanded weight would multiply. Sums run over all of K in float32.
// - Tokens are arranged before, once per product (arrange.cu), so copies are straight.
// - Blocks that share a weight tile are neighbours, so that all but one find it in the second cache. Where there are few of them,
//   K is split, as in matmul.cuh.
#include "matmul.cuh"
#include "prompt.cuh"

namespace qk {

constexpr int kPromptStages = 4, kGroupWarps = 4, kGroups = 2;

// The operand of product q of a step, of one 16-row part: unpack() with the scale applied.
template <class T, int kBits>
__device__ inline void expand_operand(const uint32_t* words, int q, const float (&zero)[2], const float (&scale)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = i % 2;
    float value[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t code = kBits == 4 ? words[q] >> (4 * i + 16 * odd) & 15 : words[2 * q + r] >> (8 * (i / 2 * 2 + odd)) & 255;
      value[odd] = (__uint_as_float(0x4b000000u | code) - zero[r]) * scale[r];
    }
    a[i] = pack<T>(value[0], value[1]);
  }
}

// A stage in shared memory: an image of tokens, then per warp codes (16 bytes of a lane), scales and zero points (4 bytes).
template <int kBits> struct PromptStage {
  static constexpr int codes = kBits / 4 * kWarp * 16, grid = kWarp * 4;
  static constexpr int warp = codes + 4 * grid, size = kImage + kGroups * kGroupWarps * warp;  // a multiple of 1024
};

template <class T, int kBits> __global__ void __launch_bounds__(kGroups * kGroupWarps* kWarp, 1) prompt(Matmul m) {
  using S = PromptStage<kBits>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = warp / kGroupWarps, part = warp % kGroupWarps;
  const int tiles = (m.n + kTileRows - 1) / kTileRows, steps = (m.k + kStep - 1) / kStep;
  const int own = blockIdx.y * kGroups + group, tile = own < tiles ? own : tiles - 1;  // the last block's second group may idle
  const int columns_last = m.k - 1, groups = (columns_last >> m.group_shift) + 1, rows_of_scales = m.group_shift == 5 ? 2 : 1;
  const char* image = static_cast<const char*>(m.x) + int64_t(blockIdx.x) * steps * kImage;
  const uint4* codes = m.codes + int64_t(tile) * steps * (kParts * kBits / 4 * kWarp);
  const int64_t grid = int64_t(tile) * groups * 8 + lane / 4;
  char* shared = static_cast<char*>(shared_memory());
  shared += (1024 - reinterpret_cast<uintptr_t>(shared) % 1024) % 1024;  // the low bits are the address's own
  char* mine = shared + kImage + warp * S::warp;
  const uint64_t policy = stream_policy(gridDim.x > 1);

  const int begin = steps * blockIdx.z / m.splits, end = steps * (blockIdx.z + 1) / m.splits;

  auto fetch = [&](int step) {
    const int slot = (step - begin) % kPromptStages * S::size;
#pragma unroll
    for (int i = 0; i < kImage / 16 / int(kGroups * kGroupWarps * kWarp); ++i) {
      const int at = (i * int(blockDim.x) + threadIdx.x) * 16;
      copy16(shared + slot + at, image + int64_t(step) * kImage + at);
    }
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      const int at = (part * kBits / 4 + i) * kWarp + lane;
      copy16_stream(mine + slot + (i * kWarp + lane) * 16, codes + int64_t(step) * (kParts * kBits / 4 * kWarp) + at, policy);
    }
    for (int i = 0; i < rows_of_scales; ++i) {
      const int column = step * kStep + i * 32 < columns_last ? step * kStep + i * 32 : columns_last;
      const int64_t at = grid + (column >> m.group_shift) * 8;
      char* to = mine + slot + S::codes + i * S::grid + lane * 4;
      copy4(to, reinterpret_cast<const uint32_t*>(m.scales + at) + part);
      if (m.zeros) copy4(to + 2 * S::grid, reinterpret_cast<const uint32_t*>(m.zeros + at) + part / 2);
    }
  };

  float d[16][4] = {};
#pragma unroll 1
  for (int step = begin; step < begin + kPromptStages - 1; ++step) {
    if (step < end) fetch(step);
    copies_commit();
  }
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    copies_wait<kPromptStages - 2>();
    show_products();
    __syncthreads();  // this stage is there for all, and nobody multiplies the one before any more
    if (step + kPromptStages - 1 < end) fetch(step + kPromptStages - 1);
    copies_commit();
    const int slot = (step - begin) % kPromptStages * S::size;
    alignas(16) uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i)
      *reinterpret_cast<uint4*>(words + 4 * i) = *reinterpret_cast<const uint4*>(mine + slot + (i * kWarp + lane) * 16);
    uint32_t a[4][4];
    float zero[2], scale[2];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q == 0 || (q == 2 && rows_of_scales == 2)) {
        const char* from = mine + slot + S::codes + q / 2 * S::grid + lane * 4;
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
        uint32_t zeros = m.zero_code * 0x0101u;
        if (m.zeros) zeros = *reinterpret_cast<const uint32_t*>(from + 2 * S::grid) >> (part % 2 * 16);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[r] = to_float_16(pair >> (16 * r) & 0xffff, m.scales_are_bfloat16);
          zero[r] = kWholes + float(zeros >> (8 * r) & 255);
        }
      }
      expand_operand<T, kBits>(words, q, zero, scale, a[q]);
      products_begin();
      wide_mma<T>(d, a[q], tile_address(shared + slot + 32 * q));
      products_commit();
    }
    products_wait();
  }

  copies_wait<0>();
  __syncthreads();  // the stages become room for the sums, (tokens, rows)
  constexpr int kPitch = kTileRows + 4;
  float* sums = reinterpret_cast<float*>(shared) + group * kPromptTokens * kPitch;
#pragma unroll
  for (int j = 0; j < 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(j * 8 + lane % 4 * 2 + i % 2) * kPitch + part * 16 + lane / 4 + i / 2 * 8] = d[j][i];
  __syncthreads();
  bool& last = *reinterpret_cast<bool*>(sums + kTileRows);  // between two rows: static shared memory would cost a block per SM
  const int first = blockIdx.x * kPromptTokens, count = own < tiles ? min(kPromptTokens, m.tokens - first) : 0;
  auto sum_of = [&](int token, int row) { return *reinterpret_cast<const float2*>(sums + token * kPitch + row); };
  const int size = kGroupWarps * kWarp;
  conclude<T, kPromptTokens>(m, tile, blockIdx.z, sum_of, first, count, threadIdx.x % size, size, last);
}

template <class T, int kBits> int launch_prompt(const Matmul& m, void* stream) {
  const int tiles = (m.n + kTileRows - 1) / kTileRows;
  const dim3 grid(unsigned((m.tokens + kPromptTokens - 1) / kPromptTokens), unsigned((tiles + kGroups - 1) / kGroups), unsigned(m.splits));
  return launch(prompt<T, kBits>, grid, kGroups * kGroupWarps * kWarp, kPromptStages * PromptStage<kBits>::size + 1024, stream, m);
}

template <class T> int launch_prompt(const Matmul& m, int bits, void* stream) {
  return bits == 4 ? launch_prompt<T, 4>(m, stream) : launch_prompt<T, 8>(m, stream);
}

}  // namespace qk

// `m.x` is what qk_arrange has made; no offsets and no scales of activations.
QK_API int qk_prompt(const qk::Matmul* m, int bits, void* stream) {
  if (m->tokens == 0) return 0;
  if (m->offsets || m->x_scales || (m->activation != qk::kNoActivation && m->n % 2)) return 1;
  return m->dtype == qk::kBFloat16 ? qk::launch_prompt<qk::BFloat16>(*m, bits, stream) : qk::launch_prompt<qk::Half>(*m, bits, stream);
}

// 8-bit codes, activations as they are.
#include "matmul.cuh"

QK_API int qk_matmul_codes8(const qk::Matmul* m, int tokens8, void* stream) {
  return qk::launch_matmul<qk::kCodes8>(*m, tokens8, stream);
}

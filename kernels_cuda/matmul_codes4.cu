// 4-bit codes, activations as they are.
#include "matmul.cuh"

QK_API int qk_matmul_codes4(const qk::Matmul* m, int tokens8, void* stream) {
  return qk::launch_matmul<qk::kCodes4>(*m, tokens8, stream);
}

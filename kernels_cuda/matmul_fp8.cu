// fp8_e4m3 weights and activations; needs sm_89.
#include "matmul.cuh"

QK_API int qk_matmul_fp8(const qk::Matmul* m, int tokens8, void* stream) {
  return qk::launch_matmul<qk::kFp8>(*m, tokens8, stream);
}

// int8 weights and activations.
#include "matmul.cuh"

QK_API int qk_matmul_int8(const qk::Matmul* m, int tokens8, void* stream) {
  return qk::launch_matmul<qk::kInt8>(*m, tokens8, stream);
}

// What the library says about itself.
#include "device.cuh"

QK_API int qk_abi_version() { return 3; }

QK_API const char* qk_error_text(int code) {
#ifdef __CUDACC__
  return cudaGetErrorString(cudaError_t(code));
#else
  return code ? "the launch was refused" : "no error";
#endif
}

// What stands between the matrix products of a decoder layer, each as one small kernel.
#include "activation.cuh"
#include "block.cuh"

namespace qk {

// --- sum, norm, and rounding of activations, a row per block -------------------------------------------------------------------

enum NormKind { kNone, kRms, kLayer };
enum Rounding { kFloat, kInt8Tokens, kFp8Tokens };

struct Norm {  // NormStruct of kernels/cuda/norms.py
  const void* x;         // (rows, n) of T
  const void* residual;  // (rows, n) of T, or null
  const float* gain;     // (n), if a norm
  const float* shift;    // (n), or null
  void* sum;             // (rows, n) of T: residual + factor * x, or null
  void* y;               // (rows, n) of T, or bytes if rounded
  float* scales;         // (rows), if rounded
  int32_t rows, n, kind, rounding, dtype;
  float eps, factor;
};

template <class T> __global__ void __launch_bounds__(1024) norm(Norm a) {
  __shared__ float reduced[32];
  float* values = static_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x * int64_t(a.n);
  const T *x = static_cast<const T*>(a.x) + row, *residual = static_cast<const T*>(a.residual) + row;
  float total = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
    float value = to_float(x[i]);
    if (a.residual) value = to_float(from_float<T>(to_float(residual[i]) + a.factor * value));
    if (a.sum) static_cast<T*>(a.sum)[row + i] = from_float<T>(value);
    values[i] = value;
    total += value;
  }
  float mean = 0, scale = 1;
  if (a.kind == kLayer) mean = block_sum(total, reduced) / a.n;
  if (a.kind != kNone) {
    float squares = 0;
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) squares += (values[i] - mean) * (values[i] - mean);
    scale = 1.0f / sqrtf(block_sum(squares, reduced) / a.n + a.eps);
  }
  float largest = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
    if (a.kind != kNone) values[i] = (values[i] - mean) * scale * a.gain[i] + (a.shift ? a.shift[i] : 0.0f);
    T rounded = from_float<T>(values[i]);
    if (a.rounding == kFloat) static_cast<T*>(a.y)[row + i] = rounded;
    values[i] = to_float(rounded);
    largest = fmaxf(largest, fabsf(values[i]));
  }
  if (a.rounding == kFloat) return;
  // As numerics.grid rounds: int8 from the largest to 127.5 steps, fp8 to its largest value, zeros with a scale of one.
  largest = block_reduce(largest, 0.0f, reduced, [](float x, float y) { return fmaxf(x, y); });
  const float step = largest == 0 ? 1.0f : largest / (a.rounding == kInt8Tokens ? 127.5f : 448.0f);
  if (threadIdx.x == 0) a.scales[blockIdx.x] = step;
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < a.n; i += 4 * blockDim.x) {
    float v[4];
    for (int j = 0; j < 4; ++j) v[j] = i + j < a.n ? values[i + j] / step : 0;
    uint32_t word = 0;
    if (a.rounding == kFp8Tokens) {
      word = pack_fp8(v[0], v[1], v[2], v[3]);
    } else {
      for (int j = 0; j < 4; ++j) word |= (uint32_t(__float2int_rn(fminf(fmaxf(v[j], -128.0f), 127.0f))) & 255) << (8 * j);
    }
    for (int j = 0; j < 4 && i + j < a.n; ++j) static_cast<uint8_t*>(a.y)[row + i + j] = word >> (8 * j) & 255;
  }
}

// --- gated activations -----------------------------------------------------------------------------------------------------------

struct Activate {  // ActivateStruct
  const void* x;  // (rows, 2 n) = [gate | up], or gates and ups in turn, or (rows, n) if not gated
  void* y;        // (rows, n)
  int32_t rows, n, activation, gated, interleaved, dtype;
};

template <class T> __global__ void __launch_bounds__(256) activate(Activate a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  const T* x = static_cast<const T*>(a.x) + blockIdx.y * int64_t(a.n) * (a.gated ? 2 : 1);
  float value = activated(to_float(x[a.interleaved ? 2 * i : i]), a.activation);
  if (a.gated) value *= to_float(x[a.interleaved ? 2 * i + 1 : a.n + i]);
  static_cast<T*>(a.y)[blockIdx.y * int64_t(a.n) + i] = from_float<T>(value);
}

}  // namespace qk

#define QK_DISPATCH(name, grid, threads, shared)                                                                               \
  (a->dtype == qk::kBFloat16 ? qk::launch(qk::name<qk::BFloat16>, grid, threads, shared, stream, *a)                           \
                             : qk::launch(qk::name<qk::Half>, grid, threads, shared, stream, *a))

QK_API int qk_norm(const qk::Norm* a, void* stream) {
  return a->rows ? QK_DISPATCH(norm, dim3(unsigned(a->rows)), a->rows <= 64 && a->n >= 1024 ? 1024 : 256, size_t(a->n) * 4) : 0;
}
QK_API int qk_activate(const qk::Activate* a, void* stream) {
  return a->rows ? QK_DISPATCH(activate, dim3(unsigned(a->n + 255) / 256, unsigned(a->rows)), 256, 0) : 0;
}

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

// kKept: a row's values stay in shared memory; a row that is too long for it is read again.
template <class T, bool kKept> __global__ void __launch_bounds__(1024) norm(Norm a) {
  __shared__ float reduced[32];
  float* values = static_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x * int64_t(a.n);
  const T *x = static_cast<const T*>(a.x) + row, *residual = static_cast<const T*>(a.residual) + row;
  T* sum = a.sum ? static_cast<T*>(a.sum) + row : nullptr;  // may be the residual: not read again once it is written
  auto first_value = [&](int i) {
    const float value = to_float(x[i]);
    return a.residual ? to_float(from_float<T>(to_float(residual[i]) + a.factor * value)) : value;
  };
  auto value_of = [&](int i) {
    if constexpr (kKept) return values[i];
    else return sum ? to_float(sum[i]) : first_value(i);
  };
  float total = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
    const float value = first_value(i);
    if (sum) sum[i] = from_float<T>(value);
    if (kKept) values[i] = value;
    total += value;
  }
  float mean = 0, scale = 1;
  if (a.kind == kLayer) mean = block_sum(total, reduced) / a.n;
  if (a.kind != kNone) {
    float squares = 0;
    for (int i = threadIdx.x; i < a.n; i += blockDim.x) squares += (value_of(i) - mean) * (value_of(i) - mean);
    scale = 1.0f / sqrtf(block_sum(squares, reduced) / a.n + a.eps);
  }
  auto rounded_of = [&](int i) {
    const float value = value_of(i);
    return from_float<T>(a.kind == kNone ? value : (value - mean) * scale * a.gain[i] + (a.shift ? a.shift[i] : 0.0f));
  };
  float largest = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
    const T rounded = rounded_of(i);
    if (a.rounding == kFloat) static_cast<T*>(a.y)[row + i] = rounded;
    if (kKept) values[i] = to_float(rounded);
    largest = fmaxf(largest, fabsf(to_float(rounded)));
  }
  if (a.rounding == kFloat) return;
  // As numerics.grid rounds: int8 from the largest to 127.5 steps, fp8 to its largest value, zeros with a scale of one.
  largest = block_reduce(largest, 0.0f, reduced, [](float x, float y) { return fmaxf(x, y); });
  const float step = largest == 0 ? 1.0f : largest / (a.rounding == kInt8Tokens ? 127.5f : 448.0f);
  if (threadIdx.x == 0) a.scales[blockIdx.x] = step;
  __syncthreads();
  for (int i = 4 * threadIdx.x; i < a.n; i += 4 * blockDim.x) {
    float v[4];
    for (int j = 0; j < 4; ++j) v[j] = i + j < a.n ? (kKept ? values[i + j] : to_float(rounded_of(i + j))) / step : 0;
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

#define QK_DISPATCH(kernel, grid, threads, shared)                                                   \
  (a->dtype == qk::kBFloat16 ? qk::launch(kernel(qk::BFloat16), grid, threads, shared, stream, *a) \
                             : qk::launch(kernel(qk::Half), grid, threads, shared, stream, *a))
#define QK_NORM_KEPT(type) qk::norm<type, true>
#define QK_NORM_READ_AGAIN(type) qk::norm<type, false>
#define QK_ACTIVATE(type) qk::activate<type>

QK_API int qk_norm(const qk::Norm* a, void* stream) {
  if (a->rows == 0) return 0;
  const dim3 grid(unsigned(a->rows));
  const int threads = a->rows <= 64 && a->n >= 1024 ? 1024 : 256;
  const size_t kept = size_t(a->n) * 4;
  if (kept + 1024 > qk::largest_shared_memory()) return QK_DISPATCH(QK_NORM_READ_AGAIN, grid, threads, 0);  // beside `reduced`
  return QK_DISPATCH(QK_NORM_KEPT, grid, threads, kept);
}
QK_API int qk_activate(const qk::Activate* a, void* stream) {
  return a->rows ? QK_DISPATCH(QK_ACTIVATE, dim3(unsigned(a->n + 255) / 256, unsigned(a->rows)), 256, 0) : 0;
}

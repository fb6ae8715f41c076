// Rotary embedding of queries and keys (head norms before it), and keys and values into their pages: a warp per row and head.
#include "pages.cuh"

namespace qk {

struct Append {  // AppendStruct of kernels/cuda/attention.py
  const void* qkv;           // (rows, heads + 2 kv_heads, head) of T
  void* q;                   // (rows, heads, head) of T
  const int32_t* positions;  // (rows); a row at a negative one is left out
  const int32_t* slots;      // (rows)
  const int32_t* table;      // (slots, stride): pages
  const float *cos, *sin;    // (positions, rotated / 2), or null
  const float *q_gain, *k_gain;  // (head): RMS norm of a head, or null
  void *keys, *values, *key_scales, *value_scales;  // see pages.cuh
  int32_t rows, heads, kv_heads, head, rotated, interleaved, stride, kv_kind, dtype;
  float eps;
};

// Store one head of a token (`values`, in shared memory) in its page.
template <class T>
__device__ void store_head(const float* values, void* codes, void* scales, int64_t token, int head, int kind, int lane) {
  if (kind == kKvFloat) {
    for (int i = lane; i < head; i += kWarp) static_cast<T*>(codes)[token * head + i] = from_float<T>(values[i]);
  } else if (kind == kKvInt8) {
    float largest = 0;
    for (int i = lane; i < head; i += kWarp) largest = fmaxf(largest, fabsf(values[i]));
    largest = warp_max(largest);
    const float scale = largest == 0 ? 1.0f : largest / 127.5f;
    for (int i = lane; i < head; i += kWarp)
      static_cast<uint8_t*>(codes)[token * head + i] = uint8_t(__float2int_rn(fminf(fmaxf(values[i] / scale, -128.0f), 127.0f)) + 128);
    if (lane == 0) static_cast<float*>(scales)[token] = scale;
  } else {
    for (int group = 0; group < head / kKvGroup; ++group) {
      const float value = values[group * kKvGroup + lane];
      const float low = fminf(-warp_max(-value), 0.0f), high = fmaxf(warp_max(value), 0.0f);
      float scale = to_float(from_float<T>((high - low) / 15.0f));
      if (scale == 0) scale = 1;
      const int zero = __float2int_rn(fminf(fmaxf(-low / scale, 0.0f), 15.0f));
      const int code = __float2int_rn(fminf(fmaxf(value / scale + zero, 0.0f), 15.0f));
      const int pair = code | exchange(code, 1) << 4;
      if (lane % 2 == 0) static_cast<uint8_t*>(codes)[(token * head + group * kKvGroup + lane) / 2] = uint8_t(pair);
      if (lane == 0)
        static_cast<uint32_t*>(scales)[token * (head / kKvGroup) + group] = from_float<T>(scale).bits | uint32_t(zero) << 16;
    }
  }
}

template <class T> __global__ void __launch_bounds__(128) append(Append a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, all = a.heads + 2 * a.kv_heads;
  const int64_t item = blockIdx.x * int64_t(4) + warp;
  if (item >= int64_t(a.rows) * all) return;
  const int row = int(item / all), which = int(item % all), position = a.positions[row];
  if (position < 0) return;
  const bool query = which < a.heads, key = !query && which < a.heads + a.kv_heads;
  float* values = static_cast<float*>(shared_memory()) + warp * 2 * a.head;
  float* turned = values + a.head;
  const T* from = static_cast<const T*>(a.qkv) + item * a.head;
  float squares = 0;
  for (int i = lane; i < a.head; i += kWarp) values[i] = to_float(from[i]), squares += values[i] * values[i];
  const float* gain = query ? a.q_gain : key ? a.k_gain : nullptr;
  if (gain) {
    const float scale = 1.0f / sqrtf(warp_sum(squares) / a.head + a.eps);
    for (int i = lane; i < a.head; i += kWarp) values[i] *= scale * gain[i];
  }
  __syncwarp();
  const int half = a.rotated / 2;
  const bool turns = a.cos && (query || key);
  for (int i = lane; i < a.head; i += kWarp) {
    float value = values[i];
    if (turns && i < a.rotated) {
      const int pair = a.interleaved ? i / 2 : i % half;
      const bool first = a.interleaved ? i % 2 == 0 : i < half;
      const float other = values[a.interleaved ? i ^ 1 : first ? i + half : i - half];
      const int64_t at = int64_t(position) * half + pair;
      value = value * a.cos[at] + (first ? -other : other) * a.sin[at];
    }
    turned[i] = value;
  }
  __syncwarp();
  if (query) {
    T* q = static_cast<T*>(a.q) + (int64_t(row) * a.heads + which) * a.head;
    for (int i = lane; i < a.head; i += kWarp) q[i] = from_float<T>(turned[i]);
    return;
  }
  const int kv_head = which - a.heads - (key ? 0 : a.kv_heads);
  const int page = a.table[int64_t(a.slots[row]) * a.stride + position / kPageTokens];
  const int64_t token = (int64_t(page) * a.kv_heads + kv_head) * kPageTokens + position % kPageTokens;
  store_head<T>(turned, key ? a.keys : a.values, key ? a.key_scales : a.value_scales, token, a.head, a.kv_kind, lane);
}

}  // namespace qk

QK_API int qk_append(const qk::Append* a, void* stream) {
  const int64_t items = int64_t(a->rows) * (a->heads + 2 * a->kv_heads);
  if (!items) return 0;
  const dim3 grid(unsigned((items + 3) / 4));
  const size_t shared = size_t(a->head) * 2 * 4 * 4;
  return a->dtype == qk::kBFloat16 ? qk::launch(qk::append<qk::BFloat16>, grid, 128, shared, stream, *a)
                                   : qk::launch(qk::append<qk::Half>, grid, 128, shared, stream, *a);
}

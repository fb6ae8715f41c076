// Rotate queries and keys by their positions, and store keys and values in their pages.
#include "decoder.h"
#include "kv.h"

namespace qk {
namespace {

// Rotate one head of a row by its position.
void rotate(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.dim / 2;
  const float *cos = rotary.cos + position * half, *sin = rotary.sin + position * half;
  for (int64_t i = 0; i < half; ++i) {
    float& a = x[rotary.interleaved ? 2 * i : i];
    float& b = x[rotary.interleaved ? 2 * i + 1 : i + half];
    const float rotated = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = rotated;
  }
}

float scale_of(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  return largest / 127.0f;
}

template <typename T>
void append(const AttentionJob& job, int64_t row, int64_t kv_head) {
  const Attention& a = *job.a;
  const Kv& kv = *job.kv;
  const int64_t position = job.batch->positions[row], d_count = a.head_dim, v_count = a.value_dim, t = position % kPageTokens;
  const int64_t page = kv.block_table[job.batch->slots[row] * kv.table_stride + position / kPageTokens];
  const int64_t at = page * a.kv_heads + kv_head;
  const float *k = key_at(job, row, kv_head), *v = value_at(job, row, kv_head);
  typename T::Stored* keys = static_cast<typename T::Stored*>(kv.keys[job.layer]) + at * kPageTokens * d_count;
  typename T::Stored* values = static_cast<typename T::Stored*>(kv.values[job.layer]) + at * kPageTokens * v_count;
  float k_inverse = 1, v_inverse = 1;
  if (kv.kind == kKvInt8) {
    const float k_scale = scale_of(k, d_count), v_scale = scale_of(v, v_count);
    kv.key_scales[job.layer][at * kPageTokens + t] = k_scale;
    kv.value_scales[job.layer][at * kPageTokens + t] = v_scale;
    k_inverse = k_scale > 0 ? 1 / k_scale : 0;
    v_inverse = v_scale > 0 ? 1 / v_scale : 0;
  }
  for (int64_t d = 0; d < d_count; ++d) keys[d * kPageTokens + t] = T::put(k[d], k_inverse);
  for (int64_t d = 0; d < v_count; ++d) values[t * v_count + d] = T::put(v[d], v_inverse);
}

void append_as(const AttentionJob& job, int64_t row, int64_t kv_head) {
  switch (job.kv->kind) {
    case kKvFloat32: return append<Float32>(job, row, kv_head);
    case kKvBFloat16: return append<BFloat16>(job, row, kv_head);
    default: return append<Int8>(job, row, kv_head);
  }
}

}  // namespace

void append_share(const AttentionJob& job, const Member& me) {
  const Attention& a = *job.a;
  const int64_t heads = a.heads + a.kv_heads, rows = job.batch->rows;
  int64_t begin, end;
  if (rows >= me.count) {
    share(me, rows, 1, &begin, &end);
    begin *= heads;
    end *= heads;
  } else {
    share(me, rows * heads, 1, &begin, &end);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / heads, head = item % heads;
    float* x = head < a.heads ? query_at(job, row, head) : key_at(job, row, head - a.heads);
    const Norm& norm = head < a.heads ? a.q_norm : a.k_norm;
    if (norm.gain && norm.width == a.head_dim) normalize_row(norm, x, x);  // norms over all heads were applied before
    if (job.rotary) rotate(*job.rotary, job.batch->positions[row], x);
    if (head >= a.heads) append_as(job, row, head - a.heads);
  }
}

}  // namespace qk

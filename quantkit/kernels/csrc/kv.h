// How keys and values are stored.
#pragma once
#include <cmath>

#include "decoder.h"

namespace qk {

struct Float32 {
  typedef float Stored;
  static Floats load(const Stored* p) { return qk::load(p); }
  static float one(Stored v) { return v; }
  static Stored put(float v, float) { return v; }
};
struct BFloat16 {
  typedef uint16_t Stored;
  static Floats load(const Stored* p) { return load_bfloats(p); }
  static float one(Stored v) { return bits_to_float(static_cast<uint32_t>(v) << 16); }
  static Stored put(float v, float) { return float_to_bfloat(v); }
};
struct Int8 {
  typedef int8_t Stored;
  static Floats load(const Stored* p) { return to_floats(load_signed_bytes(p)); }
  static float one(Stored v) { return v; }
  static Stored put(float v, float inverse) { return static_cast<int8_t>(lrintf(v * inverse)); }
};

// One head of a row's queries, keys and values.
inline float* query_at(const AttentionJob& job, int64_t row, int64_t head) {
  return job.q + row * job.stride + head * job.a->head_dim;
}
inline float* key_at(const AttentionJob& job, int64_t row, int64_t head) {
  return job.k + row * job.stride + head * job.a->head_dim;
}
inline float* value_at(const AttentionJob& job, int64_t row, int64_t head) {
  return job.v + row * job.stride + head * job.a->value_dim;
}

}  // namespace qk

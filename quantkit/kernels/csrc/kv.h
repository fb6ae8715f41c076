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

// One head of a row's [q | k | v].
inline float* head_at(const AttentionJob& job, int64_t row, int64_t head) {
  const Attention& a = *job.a;
  return job.qkv + (row * (a.heads + 2 * a.kv_heads) + head) * a.head_dim;
}

}  // namespace qk

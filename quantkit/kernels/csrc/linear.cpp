// Rounding rows of activations, and the choice of the code path for a product.
#include "linear.h"

#include "dot.h"
#include "tile.h"

namespace qk {

int32_t form_of(const Linear& l, int32_t rounding) {
  if (l.kind == kWeightFloat32) return kFormFloat32;
  if (l.kind == kWeightBFloat16) return kDotPairs && rounding >> kFormBFloat16 & 1 ? kFormBFloat16 : kFormFloat32;
  return rounding >> kFormInt8 & 1 ? kFormInt8 : kFormFloat32;
}

int64_t rows_bytes(const Rows& r) {
  if (r.form == kFormFloat32) return 0;
  if (r.form == kFormBFloat16) return r.m * rows_pairs_stride(r) * 2;
  return r.m * rows_q_stride(r) + 2 * round_up(r.m * rows_blocks(r) * 4, 64);
}

void place_rows(Rows& r, void* memory) {
  if (r.form == kFormBFloat16) r.pairs = static_cast<uint16_t*>(memory);
  if (r.form != kFormInt8) return;
  r.q = static_cast<int8_t*>(memory);
  char* end = static_cast<char*>(memory) + r.m * rows_q_stride(r);
  r.scale = reinterpret_cast<float*>(end);
  r.sum = reinterpret_cast<int32_t*>(end + round_up(r.m * rows_blocks(r) * 4, 64));
}

namespace {

// x * inverse to the nearest integer, ties to even, the product not rounded before: adding 1.5 * 2^52 (1.5 * 2^23 in float32,
// fused) leaves the integer in the low bits.
inline int32_t nearest(float x, float inverse) {
  return static_cast<int32_t>(static_cast<double>(x) * static_cast<double>(inverse) + 0x1.8p52 - 0x1.8p52);
}

inline Ints nearest(Floats x, float inverse) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return (Ints)multiply_add(x, splat(inverse), splat(0x1.8p23f)) - 0x4b400000;
#else
  Ints result;
  for (int i = 0; i < kWidth; ++i) result[i] = nearest(x[i], inverse);
  return result;
#endif
}

// Round columns [0, count) of x to q, and set q to zero up to `padded`; return the scale.
inline float quantize_block(const float* x, int64_t count, int64_t padded, int8_t* q, int32_t* sum) {
  Ints top_lanes{}, sum_lanes{};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {  // magnitudes compare as integers, infinity and NaN above everything
    const Ints bits = *reinterpret_cast<const IntsAnywhere*>(x + k) & 0x7fffffff;
    top_lanes = bits > top_lanes ? bits : top_lanes;
  }
  int32_t top = 0;
  for (int i = 0; i < kWidth; ++i) top = top_lanes[i] > top ? top_lanes[i] : top;
  for (int64_t i = k; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    top = bits > top ? bits : top;
  }
  const float largest = bits_to_float(static_cast<uint32_t>(top));
  const bool finite = top < 0x7f800000, none = !finite || largest < 0x1p-100f;
  const float inverse = none ? 0.0f : 127.0f / largest;
  *sum = 0;
  if (none) {
    memset(q, 0, static_cast<size_t>(padded));
    return finite ? 0.0f : bits_to_float(0x7fc00000u);
  }
  for (k = 0; k + kWidth <= count; k += kWidth) {
    const Ints value = nearest(*reinterpret_cast<const FloatsAnywhere*>(x + k), inverse);
    sum_lanes += value;
    *reinterpret_cast<SmallAnywhere*>(q + k) = __builtin_convertvector(value, SmallAnywhere);
  }
  for (int i = 0; i < kWidth; ++i) *sum += sum_lanes[i];
  for (; k < count; ++k) {
    q[k] = static_cast<int8_t>(nearest(x[k], inverse));
    *sum += q[k];
  }
  for (; k < padded; ++k) q[k] = 0;
  return largest / 127.0f;
}

// Round columns [begin, end) of x to bfloat16.
inline void narrow(const float* x, int64_t begin, int64_t end, uint16_t* to) {
  for (; begin + kWidth <= end; begin += kWidth)
    store_floats(to, begin, kBFloat16, *reinterpret_cast<const FloatsAnywhere*>(x + begin));
  for (; begin < end; ++begin) to[begin] = float_to_bfloat(x[begin]);
}

}  // namespace

void prepare_blocks(const Rows& r, int64_t first, int64_t last, int64_t begin, int64_t end) {
  if (r.form == kFormBFloat16) {
    const int64_t from = block_column(r, begin), to = block_column(r, end);
    for (int64_t m = first; m < last; ++m) {
      uint16_t* pairs = r.pairs + m * rows_pairs_stride(r);
      narrow(r.x + m * r.stride, from, to, pairs);
      if (to % 2) pairs[to] = 0;
    }
  }
  if (r.form != kFormInt8) return;
  const int64_t padded = round_up(r.group, 8), per_group = (padded + r.block - 1) / r.block, stride = rows_q_stride(r);
  for (int64_t m = first; m < last; ++m)
    for (int64_t block = begin, g = begin / per_group, part = begin % per_group; block < end; ++block) {
      const int64_t from = part * r.block, own = r.group - from, stored = padded - from;
      r.scale[block * r.m + m] =
          quantize_block(r.x + m * r.stride + g * r.group + from, own < r.block ? own : r.block,
                         stored < r.block ? stored : r.block, r.q + m * stride + g * padded + from, r.sum + block * r.m + m);
      if (++part == per_group) part = 0, ++g;
    }
}

void linear_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  if (r.form == kFormInt8 && l.kind != kWeightFloat32 && l.kind != kWeightBFloat16)
    int8_share(l, r, y, y_stride, begin, end, scratch);
  else
    float_share(l, r, y, y_stride, begin, end, scratch);
}

}  // namespace qk

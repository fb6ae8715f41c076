// Rounding rows of activations, and the choice of the code path for a product.
#include "linear.h"

#include <cmath>

#include "dot.h"
#include "tile.h"
#include "tiles.h"

namespace qk {

namespace {

constexpr int64_t kFloatBlock = 128;   // columns per sum of floats
constexpr int64_t kWholeBlock = 256;   // per sum of int8: it fits in 16 bits

bool is_float(const Linear& l) { return l.kind == kWeightFloat32 || l.kind == kWeightBFloat16; }

// Whether codes are whole numbers in steps of a scale.
bool is_whole(const Linear& l) { return !is_float(l) && l.kind != kWeightF8 && (l.kind != kWeightT4 || l.table->exact); }

// Columns of int8 activations per block where a scheme has scales of `in.group` columns, and the weight of l.group; 0: none fit.
int64_t scheme_block(const Linear& l, const Inputs& in) {
  if (in.group % l.group == 0) return kWholeBlock;
  if (l.group % in.group || in.group % 8) return 0;
  int64_t block = in.group < kWholeBlock ? in.group : kWholeBlock;
  while (in.group % block) block -= 8;
  return block;
}

}  // namespace

// AMD's cores make twice as many products of bfloat16 a cycle as of floats; Intel's, which leave them to the tile unit, half as
// many (measured on Emerald Rapids), and on tiles eight times as many.
bool fast_pairs() {
#if defined(__x86_64__)
#if defined(QK_HAS_TILES)
  return tiles_granted();
#endif
  static const bool amd = __builtin_cpu_is("amd");
  return kDotPairs && amd;
#else
  return kDotPairs;
#endif
}

namespace {

// Whether the products of a linear with bfloat16 numbers are fast.
bool pairs_are_fast(const Linear& l) {
  if (!tiles_granted()) return fast_pairs();
  if (l.kind == kWeightBFloat16) return l.columns % 8 == 0 && fits_tiles(l.columns, kChunk, 2);  // x is not padded
  return fits_tiles(l.group, kFloatBlock, 2);
}

}  // namespace

int32_t form_of(const Linear& l, int32_t rounding) {
  if (const Inputs* in = l.inputs) {
    const bool narrow = l.kind == kWeightU4;
    if (in->top > 0 && is_whole(l) && (kDotWhole || narrow) && scheme_block(l, *in)) return kFormInt8;
    const bool whole_row = in->scale > 0 || in->group == l.columns;
    return in->top == 0 && whole_row && !is_float(l) && pairs_are_fast(l) ? kFormPairs : kFormFloats;
  }
  const bool pairs = rounding >> kFormBFloat16 & 1 && pairs_are_fast(l);
  if (l.kind == kWeightFloat32) return kFormFloat32;
  if (l.kind == kWeightBFloat16) return pairs ? kFormBFloat16 : kFormFloat32;
  if (rounding >> kFormInt8 & 1 && l.kind != kWeightF8) return kFormInt8;
  return pairs ? kFormPairs : l.offsets ? kFormFloats : kFormFloat32;
}

void fit_rows(Rows& r, const Linear& l, int32_t rounding, int64_t block) {
  r.form = form_of(l, rounding);
  r.inputs = r.form == kFormFloat32 || r.form == kFormBFloat16 ? nullptr : l.inputs;
  r.group = r.form == kFormFloat32 ? r.columns : l.group;
  r.block = block;
  if (r.form == kFormPairs || r.form == kFormFloats) r.block = kFloatBlock;
  if (r.form == kFormInt8 && l.inputs) r.block = scheme_block(l, *l.inputs);
}

namespace {

// Take pieces of memory in order.
struct Pieces {
  char* at;
  int64_t bytes = 0;
  template <typename T>
  void take(T*& pointer, int64_t count) {
    if (at) pointer = reinterpret_cast<T*>(at + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
};

int64_t place(Rows& r, char* memory) {
  Pieces pieces{memory};
  const int64_t blocks = r.m * rows_blocks(r);
  if (r.form == kFormInt8) {
    pieces.take(r.q, r.m * rows_q_stride(r));
    pieces.take(r.scale, blocks);
    pieces.take(r.sum, blocks);
  }
  if (r.form == kFormBFloat16 || r.form == kFormPairs) pieces.take(r.pairs, r.m * rows_pairs_stride(r));
  if (r.form == kFormPairs || r.form == kFormFloats) pieces.take(r.total, blocks);
  if (r.form == kFormPairs && r.inputs) pieces.take(r.scale, r.m);
  if (r.form == kFormFloats || (r.inputs && r.inputs->mixing)) pieces.take(r.own, r.m * r.columns);
  return pieces.bytes;
}

}  // namespace

int64_t rows_bytes(const Rows& r) {
  Rows copy = r;
  return place(copy, nullptr);
}

void place_rows(Rows& r, void* memory) { place(r, static_cast<char*>(memory)); }

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

// The largest magnitude; infinity and NaN are above everything.
inline float largest_of(const float* x, int64_t count) {
  Ints top_lanes{};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {  // magnitudes compare as integers
    const Ints bits = *reinterpret_cast<const IntsAnywhere*>(x + k) & 0x7fffffff;
    top_lanes = bits > top_lanes ? bits : top_lanes;
  }
  int32_t top = 0;
  for (int i = 0; i < kWidth; ++i) top = top_lanes[i] > top ? top_lanes[i] : top;
  for (int64_t i = k; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(x[i]) & 0x7fffffffu);
    top = bits > top ? bits : top;
  }
  return bits_to_float(static_cast<uint32_t>(top));
}

inline bool is_finite(float magnitude) { return float_to_bits(magnitude) < 0x7f800000u; }

constexpr uint32_t kNaN = 0x7fc00000u;

// Round columns [0, count) of x to q, and set q to zero up to `padded`; return the scale.
inline float quantize_block(const float* x, int64_t count, int64_t padded, int8_t* q, int32_t* sum) {
  const float largest = largest_of(x, count);
  const bool finite = is_finite(largest), none = !finite || largest < 0x1p-100f;
  const float inverse = none ? 0.0f : 127.0f / largest;
  *sum = 0;
  if (none) {
    memset(q, 0, static_cast<size_t>(padded));
    return finite ? 0.0f : bits_to_float(kNaN);
  }
  Ints sum_lanes{};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
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

// A block of columns of one row.
struct Block {
  int64_t index, column, count, stored, padded;  // columns in x, own and with padding, and where it begins with padding
};

// Call f(block) for blocks [begin, end) of a row.
template <typename F>
void each_block(const Rows& r, int64_t begin, int64_t end, F f) {
  const int64_t padded = round_up(r.group, 8), per_group = (padded + r.block - 1) / r.block;
  for (int64_t block = begin, g = begin / per_group, part = begin % per_group; block < end; ++block) {
    const int64_t from = part * r.block, own = r.group - from, stored = padded - from;
    f(Block{block, g * r.group + from, own < r.block ? own : r.block, g * padded + from, stored < r.block ? stored : r.block});
    if (++part == per_group) part = 0, ++g;
  }
}

// y = x rotated: x seen as a matrix (mixes, n), times `mixing` from the left and Sylvester's matrix from the right.
void rotate(const Inputs& in, const float* x, int64_t columns, float* y) {
  const int64_t n = columns / in.mixes;
  const float factor = 1.0f / sqrtf(static_cast<float>(n));
  for (int64_t i = 0; i < in.mixes; ++i) {
    float* row = y + i * n;
    for (int64_t k = 0; k < n; ++k) row[k] = 0;
    for (int64_t j = 0; j < in.mixes; ++j) {
      const float weight = in.mixing[i * in.mixes + j] * factor;
      for (int64_t k = 0; k < n; ++k) row[k] += weight * x[j * n + k];
    }
    for (int64_t half = 1; half < n; half *= 2)
      for (int64_t j = 0; j < n; j += 2 * half)
        for (int64_t k = j; k < j + half; ++k) {
          const float a = row[k], b = row[k + half];
          row[k] = a + b;
          row[k + half] = a - b;
        }
  }
}

// The rule of a scheme for one row: scales, and numbers in steps of them.
class Rule {
 public:
  Rule(const Inputs& in, const float* x) : in_(in), x_(x) {}

  // The scale of a block; NaN if what shares it holds an infinity or a NaN.
  float scale(const Block& block) {
    const int64_t group = block.column / in_.group;
    if (group == known_) return scale_;
    known_ = group;
    const bool stored = in_.scale > 0;
    const int64_t first = stored ? 0 : group * in_.group;
    const float largest = largest_of(x_ + (stored ? block.column : first), stored ? block.count : in_.group);
    if (stored) known_ = -1;  // looked at block by block
    const float reach = in_.top ? static_cast<float>(in_.top) + 0.5f : 448.0f;
    scale_ = stored ? in_.scale : largest / reach;
    if (scale_ == 0) scale_ = 1.0f;
    if (!is_finite(largest) || !is_finite(scale_)) scale_ = bits_to_float(kNaN);
    return scale_;
  }

  // Numbers of columns [at, at + kWidth) in steps of `step`, rounded.
  Floats round(Floats x, float step) const {
    const float top = in_.top ? static_cast<float>(in_.top) : 448.0f, least = in_.top ? -top - 1.0f : -top;
    Floats value = x / step;
    value = value > top + 1.0f ? splat(top + 1.0f) : value;
    value = value < least - 1.0f ? splat(least - 1.0f) : value;
    value = in_.top ? (value + 0x1.8p23f) - 0x1.8p23f : value;
    value = value > top ? splat(top) : value;
    value = value < least ? splat(least) : value;
    return in_.top ? value : to_e4m3(value);
  }

 private:
  const Inputs in_;
  const float* x_;
  int64_t known_ = -1;
  float scale_ = 1;
};

// Call f(offset, values, count) for every register of a block of x, the last one padded with zeros.
template <typename F>
void each_register(const float* x, int64_t count, F f) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) f(k, *reinterpret_cast<const FloatsAnywhere*>(x + k), static_cast<int64_t>(kWidth));
  if (k == count) return;
  Floats tail{};
  for (int64_t i = k; i < count; ++i) tail[i - k] = x[i];
  f(k, tail, count - k);
}

float sum_of(Floats lanes) {
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += lanes[i];
  return sum;
}

// Round a block to int8 in steps of a scheme's scale; return the scale.
float quantize_by_rule(Rule& rule, const float* x, const Block& block, int8_t* q, int32_t* sum) {
  const float scale = rule.scale(block);
  memset(q, 0, static_cast<size_t>(block.padded));
  *sum = 0;
  if (scale != scale) return scale;
  Ints sums{};
  each_register(x, block.count, [&](int64_t k, Floats values, int64_t count) {
    const Ints whole = __builtin_convertvector(rule.round(values, scale), Ints);
    sums += whole;
    const SmallAnywhere small = __builtin_convertvector(whole, SmallAnywhere);
    memcpy(q + k, &small, static_cast<size_t>(count));
  });
  for (int i = 0; i < kWidth; ++i) *sum += sums[i];
  return scale;
}

// Columns 0 2 1 3 of every four.
void swap_middles(uint16_t* pairs, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    uint64_t four;
    memcpy(&four, pairs + i, 8);
    four = (four & 0xffff00000000ffffu) | (four & 0xffff0000u) << 16 | (four >> 16 & 0xffff0000u);
    memcpy(pairs + i, &four, 8);
  }
}

// A block as bfloat16; with a rule, numbers in steps of the scale. Returns their sum.
float narrow_block(Rule* rule, const float* x, const Block& block, uint16_t* pairs, float* scale) {
  const float step = rule ? *scale = rule->scale(block) : 1.0f;
  Floats sums{};
  memset(pairs, 0, static_cast<size_t>(block.padded) * 2);
  each_register(x, block.count, [&](int64_t k, Floats values, int64_t count) {
    const HalvesAnywhere narrow = to_bfloats(rule ? rule->round(values, step) : values);
    memcpy(pairs + k, &narrow, static_cast<size_t>(count) * 2);
    uint16_t again[kWidth];
    memcpy(again, &narrow, sizeof again);
    sums += load_bfloats(again);
  });
  swap_middles(pairs, block.padded);
  return sum_of(sums);
}

// A block as floats, rounded by a rule if there is one. Returns their sum. `x` may be `to`.
float copy_block(Rule* rule, const float* x, const Block& block, float* to) {
  const float step = rule ? rule->scale(block) : 1.0f;
  Floats sums{};
  each_register(x, block.count, [&](int64_t k, Floats values, int64_t count) {
    const Floats rounded = rule ? rule->round(values, step) * step : values;
    memcpy(to + k, &rounded, static_cast<size_t>(count) * 4);
    sums += rounded;
  });
  return sum_of(sums);
}

// Blocks [begin, end) of row m.
void prepare_row(const Rows& r, int64_t m, int64_t begin, int64_t end) {
  const float* x = r.x + m * r.stride;
  float* own = r.own ? r.own + m * r.columns : nullptr;
  if (r.inputs && r.inputs->mixing) {
    rotate(*r.inputs, x, r.columns, own);
    x = own;
  }
  Rule by(r.inputs ? *r.inputs : Inputs{}, x);
  Rule* rule = r.inputs ? &by : nullptr;
  each_block(r, begin, end, [&](const Block& b) {
    const int64_t at = b.index * r.m + m;
    if (r.form == kFormInt8) {
      int8_t* q = r.q + m * rows_q_stride(r) + b.stored;
      r.scale[at] = rule ? quantize_by_rule(by, x + b.column, b, q, r.sum + at)
                         : quantize_block(x + b.column, b.count, b.padded, q, r.sum + at);
    } else if (r.form == kFormPairs) {
      r.total[at] = narrow_block(rule, x + b.column, b, r.pairs + m * rows_pairs_stride(r) + b.stored, rule ? r.scale + m : nullptr);
    } else {
      r.total[at] = copy_block(rule, x + b.column, b, own + b.column);
    }
  });
}

}  // namespace

void prepare_blocks(const Rows& r, int64_t first, int64_t last, int64_t begin, int64_t end) {
  if (r.form == kFormFloat32) return;
  if (r.form != kFormBFloat16) {
    for (int64_t m = first; m < last; ++m) prepare_row(r, m, begin, end);
    return;
  }
  const int64_t from = block_column(r, begin), to = block_column(r, end);
  for (int64_t m = first; m < last; ++m) {
    uint16_t* pairs = r.pairs + m * rows_pairs_stride(r);
    narrow(r.x + m * r.stride, from, to, pairs);
    if (to % 2) pairs[to] = 0;
  }
}

void linear_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  if (r.form == kFormInt8) int8_share(l, r, y, y_stride, begin, end, scratch);
  else if (r.form == kFormBFloat16 || r.form == kFormPairs) pairs_share(l, r, y, y_stride, begin, end, scratch);
  else float_share(l, r, y, y_stride, begin, end, scratch);
}

}  // namespace qk

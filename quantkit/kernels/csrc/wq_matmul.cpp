// y = x @ w.T + bias for weights of 2, 4 or 8 stored bits, w = (code - zero) * scale, everything accumulated in float32.
//
// Layout. Rows of w come in blocks of 16, one row per lane. words[block][group][word][lane] holds 32 / bits codes of one
// row, first code in the lowest bits; a group is padded to whole words. scale[block][group][lane] is half or float;
// zero[block][group][lane] is a byte, or absent for one zero code shared by all.
//
// Codes to floats without a shift or a conversion: OR-ing a code's bits, where they stand in the lower half of the word,
// into the bits of 2^23 gives the float 2^23 + code * 2^s, where s is the code's bit position; subtracting 2^23 + zero *
// 2^s is exact and leaves (code - zero) * 2^s. The 2^-s goes into x once per call. So a weight costs one logic op (AND and
// OR are one ternary op on AVX-512), one subtraction and M multiply-adds, and one shift serves half a word.
//
// Sums: a group is summed in order, and its sum times the scale is added to the row's total. The order depends neither on
// M nor on the threads, so a row of x gives the same bits alone or in a batch. Multiply-adds have a latency, so a tile
// keeps at least four independent sums (rows of w times rows of x) in flight. Eight rows of x share the decoding of a
// weight, which is then a fifth of the work: many rows need no other algorithm, only to be taken a cache-full at a time.
//
// A "unit" is a register's worth of a block: the whole block on AVX-512, half of it on AVX2, a quarter elsewhere.
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"
#include "vector.h"

namespace qk {
namespace {

constexpr int64_t kPanelFloats = 1 << 18;  // of x at a time: half of a common level-2 cache

struct Weight {
  const uint32_t* words;
  const void* scale;
  const uint8_t* zero;
  int64_t rows, columns, group, groups, words_per_group;
  int32_t scale_dtype, zero_code;
};

struct Job {
  Weight w;
  const void* bias;
  const float* x;  // (m, groups, words_per_group, codes per word), zero padded, scaled by 2^-s
  void* y;         // (m, rows), or (2 * columns, m) when splitting
  int64_t m, first_block;
  int32_t dtype;  // of x, y and bias
};

inline int64_t scale_at(const Weight& w, int64_t unit, int64_t group) {
  return (unit / kParts * w.groups + group) * kLanes + unit % kParts * kWidth;
}

inline const uint32_t* words_at(const Weight& w, int64_t unit) {
  return w.words + unit / kParts * w.groups * w.words_per_group * kLanes + unit % kParts * kWidth;
}

template <int BITS>
inline void load_offsets(const Weight& w, int64_t at, Floats* offsets) {
  Floats zero = w.zero ? to_floats(load_bytes(w.zero + at)) : splat(static_cast<float>(w.zero_code));
  for (int f = 0; f < 16 / BITS; ++f) offsets[f] = 0x1p23f + zero * static_cast<float>(1 << (BITS * f));
}

template <int BITS>
inline Floats decode(Words word, int field, Floats offset) {
  const uint32_t mask = ((1u << BITS) - 1u) << (BITS * field);
  return (Floats)((word & mask) | 0x4b000000u) - offset;
}

inline void store(const Job& job, int64_t m, int64_t unit, Floats total) {
  int64_t row = unit * kWidth, count = job.w.rows - row < kWidth ? job.w.rows - row : kWidth;
  int64_t at = m * job.w.rows + row;
  if (count == kWidth) {
    store_floats(job.y, at, job.dtype, job.bias ? total + load_floats(job.bias, row, job.dtype) : total);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float value = job.bias ? total[i] + load_one(job.bias, row + i, job.dtype) : total[i];
    store_one(job.y, at + i, job.dtype, value);
  }
}

// UNITS x kWidth outputs of M rows of x.
template <int BITS, int M, int UNITS>
void tile(const Job& job, int64_t unit, int64_t m0) {
  constexpr int kFields = 16 / BITS, kCodes = 32 / BITS;
  const Weight& w = job.w;
  const int64_t x_stride = w.groups * w.words_per_group * kCodes;
  const float* x = job.x + m0 * x_stride;
  const uint32_t* words[UNITS];
  const int64_t ahead = words_at(w, unit + UNITS) - words_at(w, unit);
  for (int u = 0; u < UNITS; ++u) words[u] = words_at(w, unit + u);
  Floats total[UNITS][M] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    Floats sum[UNITS][M] = {}, offsets[UNITS][kFields];
    for (int u = 0; u < UNITS; ++u) load_offsets<BITS>(w, scale_at(w, unit + u, g), offsets[u]);
    for (int64_t i = 0; i < w.words_per_group; ++i, x += kCodes) {
      Words word[UNITS];
      for (int u = 0; u < UNITS; ++u) {
        word[u] = *reinterpret_cast<const WordsAnywhere*>(words[u]);
        if (kParts == 1) __builtin_prefetch(words[u] + ahead);  // the next tile's: rows are too short for the hardware's
        words[u] += kLanes;
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
        for (int f = 0; f < kFields; ++f) {
          Floats code[UNITS];
          for (int u = 0; u < UNITS; ++u) code[u] = decode<BITS>(word[u], f, offsets[u][f]);
          for (int m = 0; m < M; ++m) {
            Floats value = splat(x[m * x_stride + half * kFields + f]);
            for (int u = 0; u < UNITS; ++u) sum[u][m] += code[u] * value;
          }
        }
        for (int u = 0; u < UNITS; ++u) word[u] >>= 16;
      }
    }
    for (int u = 0; u < UNITS; ++u) {
      Floats scale = load_floats(w.scale, scale_at(w, unit + u, g), w.scale_dtype);
      for (int m = 0; m < M; ++m) total[u][m] += scale * sum[u][m];
    }
  }
  for (int u = 0; u < UNITS; ++u)
    for (int m = 0; m < M; ++m) store(job, m0 + m, unit + u, total[u][m]);
}

template <int BITS, int UNITS>
void tile_rows(const Job& job, int64_t unit) {
  int64_t m = 0;
  for (; kWidth == 16 && m + 8 <= job.m; m += 8) tile<BITS, 8, UNITS>(job, unit, m);
  for (; m + 4 <= job.m; m += 4) tile<BITS, 4, UNITS>(job, unit, m);
  for (; m + 2 <= job.m; m += 2) tile<BITS, 2, UNITS>(job, unit, m);
  for (; m < job.m; ++m) tile<BITS, 1, UNITS>(job, unit, m);
}

template <int BITS>
void matmul_blocks(const void* argument, int64_t begin, int64_t end) {
  const Job& job = *static_cast<const Job*>(argument);
  int64_t unit = begin * kParts, last = end * kParts;
  for (; job.m == 1 && unit + 4 <= last; unit += 4) tile<BITS, 1, 4>(job, unit, 0);
  for (; unit + 2 <= last; unit += 2) tile_rows<BITS, 2>(job, unit);
  for (; unit < last; ++unit) tile_rows<BITS, 1>(job, unit);
}

// Blocks of w, transposed, each weight as two bfloat16 values whose sum keeps 16 bits of its mantissa:
// out[column][row - first row] and, w.columns columns later, the rest; `ld` elements between columns.
template <int BITS>
void split_blocks(const void* argument, int64_t begin, int64_t end) {
  constexpr int kFields = 16 / BITS, kCodes = 32 / BITS;
  const Job& job = *static_cast<const Job*>(argument);
  const Weight& w = job.w;
  const int64_t ld = job.m, first = job.first_block * kParts, low = w.columns * ld;
  for (int64_t unit = first + begin * kParts; unit < first + end * kParts; ++unit) {
    const uint32_t* words = words_at(w, unit);
    for (int64_t g = 0; g < w.groups; ++g) {
      Floats offsets[kFields], scale = load_floats(w.scale, scale_at(w, unit, g), w.scale_dtype);
      load_offsets<BITS>(w, scale_at(w, unit, g), offsets);
      const int64_t out = g * w.group * ld + (unit - first) * kWidth;
      for (int64_t i = 0; i < w.words_per_group; ++i, words += kLanes) {
        Words word = *reinterpret_cast<const WordsAnywhere*>(words);
        for (int c = 0; c < kCodes && i * kCodes + c < w.group; ++c) {
          const int f = c % kFields;
          const int64_t at = out + (i * kCodes + c) * ld;
          Floats value = decode<BITS>(c < kFields ? word : word >> 16, f, offsets[f]);
          value *= scale * (1.0f / static_cast<float>(1 << (BITS * f)));
          store_floats(job.y, at, kBFloat16, value);
          store_floats(job.y, at + low, kBFloat16, value - load_floats(job.y, at, kBFloat16));
        }
      }
    }
  }
}

struct Free {
  void operator()(float* p) const { free(p); }
};

// Grow-only scratch of the calling thread, freed when the thread ends.
float* scratch(int64_t count) {
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local int64_t capacity = 0;
  if (count > capacity) {
    buffer.reset(static_cast<float*>(malloc(static_cast<size_t>(count) * sizeof(float))));
    capacity = buffer ? count : 0;
  }
  return buffer.get();
}

struct Arrangement {
  const Weight& w;
  const void* x;
  float* out;
  int32_t dtype;
};

// Rows of x (m, columns) to float32 in the words' order, each element scaled by 2^-s of the field it meets.
template <int BITS>
void arrange(const void* argument, int64_t row, int64_t last_row) {
  constexpr int kCodes = 32 / BITS;
  const Arrangement& job = *static_cast<const Arrangement*>(argument);
  const int64_t group = job.w.group, padded = job.w.words_per_group * kCodes;
  float* out = job.out + row * job.w.groups * padded;
  for (int64_t from = row * job.w.columns; from < last_row * job.w.columns; from += group, out += padded) {
    int64_t k = 0;
    for (; k + kWidth <= group; k += kWidth)
      *reinterpret_cast<FloatsAnywhere*>(out + k) = load_floats(job.x, from + k, job.dtype);
    for (; k < group; ++k) out[k] = load_one(job.x, from + k, job.dtype);
    for (; k < padded; ++k) out[k] = 0.0f;
    for (k = 0; k < padded; k += kCodes)
      for (int c = 0; c < kCodes; ++c) out[k + c] *= 1.0f / static_cast<float>(1 << (BITS * (c % (kCodes / 2))));
  }
}

Weight weight(const void* words, const void* scale, const void* zero, int64_t rows, int64_t columns, int64_t group,
              int32_t bits, int32_t zero_code, int32_t scale_dtype) {
  const int64_t codes = 32 / bits;
  return {static_cast<const uint32_t*>(words), scale, static_cast<const uint8_t*>(zero), rows, columns, group,
          columns / group, (group + codes - 1) / codes, scale_dtype, zero_code};
}

RangeBody pick(int32_t bits, RangeBody two, RangeBody four, RangeBody eight) {
  return bits == 2 ? two : bits == 4 ? four : bits == 8 ? eight : nullptr;
}

}  // namespace
}  // namespace qk

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

QK_EXPORT int32_t qk_abi_version() { return 1; }

QK_EXPORT const char* qk_isa() {
#if defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "portable";
#endif
}

// y (m, rows) = x (m, columns) @ w.T + bias; x, y and bias share `dtype`. Returns 0, 1 for bad bits, 2 for no memory.
QK_EXPORT int32_t qk_wq_matmul(const void* words, const void* scale, const void* zero, const void* bias, const void* x, void* y,
                               int64_t m, int64_t rows, int64_t columns, int64_t group, int32_t bits, int32_t zero_code,
                               int32_t scale_dtype, int32_t dtype, int32_t threads) {
  using namespace qk;
  RangeBody multiply = pick(bits, matmul_blocks<2>, matmul_blocks<4>, matmul_blocks<8>);
  if (!multiply) return 1;
  RangeBody prepare = pick(bits, arrange<2>, arrange<4>, arrange<8>);
  Weight w = weight(words, scale, zero, rows, columns, group, bits, zero_code, scale_dtype);
  const int64_t width = w.groups * w.words_per_group * (32 / bits), size = dtype == kFloat32 ? 4 : 2;
  const int64_t fits = kPanelFloats / width / 8 * 8, panel = fits > 32 ? fits : 32;
  float* arranged = scratch((m < panel ? m : panel) * width);
  if (m > 0 && !arranged) return 2;
  // Few blocks: one range per thread. Many: four, so that a thread the system puts aside is waited for less.
  const int64_t blocks = (rows + kLanes - 1) / kLanes, ranges = blocks < 32 * threads ? threads : 4 * threads;
  for (int64_t from = 0; from < m; from += panel) {
    const int64_t count = m - from < panel ? m - from : panel;
    Arrangement arrangement{w, static_cast<const char*>(x) + from * columns * size, arranged, dtype};
    parallel_for(count, 16, threads, prepare, &arrangement);
    Job job{w, bias, arranged, static_cast<char*>(y) + from * rows * size, count, 0, dtype};
    parallel_for(blocks, ((blocks + ranges - 1) / ranges + 1) / 2 * 2, threads, multiply, &job);
  }
  return 0;
}

// Rows [16 * first_block, 16 * last_block) of w to out (2 * columns, ld) bfloat16, transposed, high parts above low parts;
// rows past the last are written too.
QK_EXPORT int32_t qk_wq_split(const void* words, const void* scale, const void* zero, void* out, int64_t ld, int64_t first_block,
                              int64_t last_block, int64_t rows, int64_t columns, int64_t group, int32_t bits, int32_t zero_code,
                              int32_t scale_dtype, int32_t threads) {
  using namespace qk;
  RangeBody body = pick(bits, split_blocks<2>, split_blocks<4>, split_blocks<8>);
  if (!body) return 1;
  Weight w = weight(words, scale, zero, rows, columns, group, bits, zero_code, scale_dtype);
  Job job{w, nullptr, nullptr, out, ld, first_block, kBFloat16};
  const int64_t blocks = last_block - first_block;
  parallel_for(blocks, (blocks + threads - 1) / threads, threads, body, &job);
  return 0;
}

// Rounding to nearest in one pass: grid, codes, packed codes and error of every row.
//
// quantkit/numerics/grid.py and pack.py define the results, and these are the same to the last bit: scale = max|w| / ((2^b - 1) / 2),
// or range / (2^b - 1), rounded to its stored dtype; code = nearest(w / scale) + zero, ties to even, within the grid; codes as a
// dense little-endian stream of bits per row. Plain torch passes over the weight some 25 times.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "vector.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

namespace qk {
namespace {

struct Rounding {
  const void* weight;  // (rows, columns)
  float* scale;        // (rows, columns / group), rounded to scale_dtype
  uint8_t* zero;       // (rows, columns / group); written if zero_code < 0
  uint8_t* packed;     // (rows, row_bytes)
  double* sums;        // (rows, 2): squared error, squared weight
  uint8_t* lost;       // (rows,): not all weights are zero, but all that they are rounded to
  int64_t columns, group, row_bytes;
  int32_t weight_dtype, bits, zero_code, scale_dtype;
};

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, for |x| < 2^22.
inline float nearest_integer(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

float stored_scale(float scale, int32_t dtype) {
  if (scale == 0) return 1;
  if (dtype == kFloat32) return scale;
  uint16_t raw;
  store_one(&raw, 0, dtype, scale);
  const float stored = load_one(&raw, 0, dtype);
  return stored != 0 ? stored : dtype == kFloat16 ? 0x1p-14f : 0x1p-126f;
}

void load_row(const Rounding& r, int64_t row, float* w) {
  const int64_t at = row * r.columns;
  if (r.weight_dtype == kFloat32) {
    memcpy(w, static_cast<const float*>(r.weight) + at, r.columns * sizeof(float));
  } else if (r.weight_dtype == kBFloat16) {
    const uint16_t* raw = static_cast<const uint16_t*>(r.weight) + at;
    for (int64_t i = 0; i < r.columns; ++i) {
      const uint32_t wide = static_cast<uint32_t>(raw[i]) << 16;
      memcpy(w + i, &wide, 4);
    }
  } else {
    for (int64_t i = 0; i < r.columns; ++i) w[i] = load_one(r.weight, at + i, r.weight_dtype);
  }
}

// Extremes of a group, in eight chains so that the compiler can use registers of eight.
void extremes(const float* w, int64_t size, float* low, float* high) {
  float least[16] = {}, most[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int k = 0; k < 16; ++k) least[k] = std::min(least[k], w[i + k]), most[k] = std::max(most[k], w[i + k]);
  }
  for (; i < size; ++i) least[0] = std::min(least[0], w[i]), most[0] = std::max(most[0], w[i]);
  for (int k = 1; k < 16; ++k) least[0] = std::min(least[0], least[k]), most[0] = std::max(most[0], most[k]);
  *low = least[0], *high = most[0];
}

double squares(const float* x, int64_t size) {
  double chains[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int k = 0; k < 16; ++k) chains[k] += static_cast<double>(x[i + k] * x[i + k]);
  }
  for (; i < size; ++i) chains[0] += static_cast<double>(x[i] * x[i]);
  for (int k = 1; k < 16; ++k) chains[0] += chains[k];
  return chains[0];
}

void pack_row(const uint8_t* codes, int64_t columns, int32_t bits, uint8_t* out, int64_t bytes) {
  if (bits == 8) {
    memcpy(out, codes, columns);
    memset(out + columns, 0, bytes - columns);
    return;
  }
  if (bits == 4) {
    const int64_t pairs = columns / 2;
    for (int64_t i = 0; i < pairs; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    memset(out + pairs, 0, bytes - pairs);
    if (columns % 2) out[pairs] = codes[columns - 1];
    return;
  }
  memset(out, 0, bytes);
  uint32_t held = 0, filled = 0;
  for (int64_t i = 0; i < columns; ++i) {
    held |= static_cast<uint32_t>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8, held >>= 8) *out++ = static_cast<uint8_t>(held);
  }
  if (filled) *out = static_cast<uint8_t>(held);
}

void round_rows(const void* job, int64_t begin, int64_t end) {
  const Rounding& r = *static_cast<const Rounding*>(job);
  const int64_t groups = r.columns / r.group;
  const float top = static_cast<float>((1 << r.bits) - 1);
  std::unique_ptr<float[]> memory(new float[3 * r.columns]);
  std::unique_ptr<uint8_t[]> codes(new uint8_t[r.columns]);
  float *w = memory.get(), *level = w + r.columns, *error = level + r.columns;
  for (int64_t row = begin; row < end; ++row) {
    load_row(r, row, w);
    bool any = false, kept = false;
    for (int64_t g = 0; g < groups; ++g) {
      const float* from = w + g * r.group;
      float low, high;
      extremes(from, r.group, &low, &high);
      any = any || low < 0 || high > 0;
      const bool symmetric = r.zero_code >= 0;
      const float range = symmetric ? std::max(-low, high) / (top / 2) : (high - low) / top;
      const float scale = stored_scale(range, r.scale_dtype);
      const float zero =
          symmetric ? static_cast<float>(r.zero_code) : std::min(std::max(std::nearbyint(-low / scale), 0.0f), top);
      r.scale[row * groups + g] = scale;
      if (!symmetric) r.zero[row * groups + g] = static_cast<uint8_t>(zero);
      float* to = level + g * r.group;
      for (int64_t i = 0; i < r.group; ++i) {
        to[i] = nearest_integer(std::min(std::max(from[i] / scale, -zero), top - zero));
      }
      uint8_t* code = codes.get() + g * r.group;
      for (int64_t i = 0; i < r.group; ++i) code[i] = static_cast<uint8_t>(static_cast<int32_t>(to[i] + zero));
      int32_t used = 0;
      for (int64_t i = 0; i < r.group; ++i) used |= to[i] != 0;
      kept = kept || used;
      for (int64_t i = 0; i < r.group; ++i) to[i] *= scale;
    }
    for (int64_t i = 0; i < r.columns; ++i) error[i] = w[i] - level[i];
    r.sums[2 * row] = squares(error, r.columns), r.sums[2 * row + 1] = squares(w, r.columns);
    r.lost[row] = any && !kept;
    pack_row(codes.get(), r.columns, r.bits, r.packed + row * r.row_bytes, r.row_bytes);
  }
}

}  // namespace
}  // namespace qk

QK_EXPORT int32_t qk_round(const void* weight, float* scale, uint8_t* zero, void* packed, double* sums, uint8_t* lost,
                           int64_t rows, int64_t columns, int64_t group, int64_t row_bytes, int32_t weight_dtype, int32_t bits,
                           int32_t zero_code, int32_t scale_dtype, int32_t threads) {
  qk::Rounding job{weight,  scale, zero,      static_cast<uint8_t*>(packed), sums, lost, columns,
                   group, row_bytes, weight_dtype, bits, zero_code, scale_dtype};
  qk::parallel_for(rows, 16, threads, qk::round_rows, &job);
  return 0;
}

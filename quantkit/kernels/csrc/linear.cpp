// linear.h in plain loops.
#include "linear.h"

#include <cmath>

#include "vector.h"

namespace qk {

int64_t rows_bytes(const Rows& r) { return r.m * rows_q_stride(r) + 2 * round_up(r.m * rows_blocks(r) * 4, 64); }

void place_rows(Rows& r, void* memory) {
  r.q = static_cast<int8_t*>(memory);
  char* end = static_cast<char*>(memory) + r.m * rows_q_stride(r);
  r.scale = reinterpret_cast<float*>(end);
  r.sum = reinterpret_cast<int32_t*>(end + round_up(r.m * rows_blocks(r) * 4, 64));
}

void prepare_rows(const Rows& r, int64_t first, int64_t last) {
  const int64_t padded = round_up(r.group, 8), per_group = (padded + r.block - 1) / r.block;
  for (int64_t m = first; m < last; ++m) {
    for (int64_t b = 0; b < rows_blocks(r); ++b) {
      const int64_t g = b / per_group, from = b % per_group * r.block, stop = from + r.block < padded ? from + r.block : padded;
      const float* x = r.x + m * r.stride + g * r.group;
      int8_t* q = r.q + m * rows_q_stride(r) + g * padded;
      float top = 0;
      for (int64_t k = from; k < stop && k < r.group; ++k) top = std::isfinite(x[k]) ? std::fmax(top, std::fabs(x[k])) : NAN;
      const bool none = !(top >= 0x1p-100f);
      int32_t sum = 0;
      for (int64_t k = from; k < stop; ++k) {
        q[k] = none || k >= r.group ? 0 : static_cast<int8_t>(std::nearbyint(x[k] * (127 / top)));
        sum += q[k];
      }
      r.scale[m * rows_blocks(r) + b] = top != top ? top : none ? 0 : top / 127;
      r.sum[m * rows_blocks(r) + b] = sum;
    }
  }
}

static float weight(const Linear& l, int64_t block, int64_t lane, int64_t column) {
  const int64_t padded = round_up(l.group, 8), groups = l.columns / l.group;
  const int64_t at = block * 16 * groups * padded, k = column / l.group * padded + column % l.group;
  if (l.kind == kWeightFloat32) return static_cast<const float*>(l.codes)[at + k * 16 + lane];
  if (l.kind == kWeightBFloat16) return load_one(l.codes, at + (k / 2 * 16 + lane) * 2 + k % 2, kBFloat16);
  const uint8_t* codes = static_cast<const uint8_t*>(l.codes);
  if (l.kind == kWeightU8) return codes[at + (k / 4 * 16 + lane) * 4 + k % 4];
  return (codes[at / 2 + (k / 8 * 16 + lane) * 4 + k % 4] >> (k % 8 / 4 * 4)) & 15;
}

void linear_share(const Linear& l, const Rows& r, bool exact, float* y, int64_t y_stride, int64_t begin, int64_t end, void*) {
  const int64_t padded = round_up(l.group, 8), groups = l.columns / l.group, per_group = (padded + r.block - 1) / r.block;
  const bool quantized = l.kind == kWeightU4 || l.kind == kWeightU8;
  exact = exact || !quantized;
  for (int64_t row = begin * 16; row < end * 16 && row < l.rows; ++row) {
    const int64_t block = row / 16, lane = row % 16;
    for (int64_t m = 0; m < r.m; ++m) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (block * groups + g) * 16 + lane;
        const float scale = quantized ? load_one(l.scales, at, l.scale_dtype) : 1;
        const int32_t zero = !quantized ? 0 : l.zeros ? l.zeros[at] : l.zero_code;
        float sum = 0;
        for (int64_t k = 0; exact && k < l.group; ++k)
          sum += (weight(l, block, lane, g * l.group + k) - static_cast<float>(zero)) * r.x[m * r.stride + g * l.group + k];
        total += scale * sum;
        for (int64_t b = 0; !exact && b < per_group; ++b) {
          const int64_t i = m * rows_blocks(r) + g * per_group + b;
          int32_t dot = -zero * r.sum[i];
          for (int64_t k = b * r.block; k < (b + 1) * r.block && k < l.group; ++k)
            dot += static_cast<int32_t>(weight(l, block, lane, g * l.group + k)) * r.q[m * rows_q_stride(r) + g * padded + k];
          total += static_cast<float>(dot) * (scale * r.scale[i]);
        }
      }
      y[m * y_stride + row] = l.bias ? total + l.bias[row] : total;
    }
  }
}

}  // namespace qk

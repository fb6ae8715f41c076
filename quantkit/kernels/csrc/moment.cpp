// Sums of outer products over tokens, left^T right, of rows rounded to bfloat16 and added in float32.
//
// Rows are packed into panels of kPanel columns with two rows per word, which is the operand of one instruction: 16 columns x 2
// rows. A tile of 4 x 64 sums stays in registers while it moves down a panel. A product of
// two bfloat16 numbers is exact in float32. Every tile is summed by one thread in order, so the
// number of threads does not change results.
#include <algorithm>
#include <memory>

#include "parallel.h"
#include "vector.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512BF16__)
namespace qk {
namespace {

constexpr int64_t kPanel = 64, kTile = 4, kPairs = 64;  // a panel of kPairs pairs of rows is 16 KiB, half a first-level cache

struct Moment {
  const void *left, *right;  // (rows, columns)
  float* total;              // (columns, columns)
  uint32_t *left_panels, *right_panels;
  int64_t rows, columns, panels, first;  // rows first .. first + 2 kPairs are packed
  int32_t dtype;
};

void pack_panel(const void* rows, int64_t count, int64_t columns, int64_t first, int32_t dtype, int64_t panel, uint32_t* to) {
  const int64_t begin = panel * kPanel, width = std::min(kPanel, columns - begin);
  for (int64_t pair = 0; pair < kPairs; ++pair, to += kPanel) {
    const int64_t row = first + 2 * pair;
    if (row >= count || width < kPanel) std::fill(to, to + kPanel, 0u);
    for (int64_t half = 0; half < 2 && row + half < count; ++half) {
      const int64_t at = (row + half) * columns + begin;
      int64_t i = 0;
      for (; i + kWidth <= width; i += kWidth) {
        const __m512i word = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load_floats(rows, at + i, dtype)));
        if (half == 0) {
          _mm512_storeu_si512(to + i, word);
        } else {
          _mm512_storeu_si512(to + i, _mm512_or_si512(_mm512_loadu_si512(to + i), _mm512_slli_epi32(word, 16)));
        }
      }
      for (; i < width; ++i) {
        const uint32_t word = float_to_bfloat(load_one(rows, at + i, dtype));
        to[i] = half == 0 ? word : to[i] | word << 16;
      }
    }
  }
}

void pack_panels(const void* job, int64_t begin, int64_t end) {
  const Moment& m = *static_cast<const Moment*>(job);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t at = panel * kPairs * kPanel;
    pack_panel(m.right, m.rows, m.columns, m.first, m.dtype, panel, m.right_panels + at);
    if (m.left_panels != m.right_panels) pack_panel(m.left, m.rows, m.columns, m.first, m.dtype, panel, m.left_panels + at);
  }
}

// total[4 rows][64 columns] += the sum over all pairs of left[pair][4] * right[pair][64]
void add_tile(const uint32_t* left, const uint32_t* right, float* total, int64_t stride, int64_t height, int64_t width) {
  __m512 sums[kTile][4];
  for (auto& row : sums) {
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < kPairs; ++pair, left += kPanel, right += kPanel) {
    __m512bh column[4];
    for (int j = 0; j < 4; ++j) column[j] = (__m512bh)_mm512_loadu_si512(right + 16 * j);
    for (int i = 0; i < kTile; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(left[i]));
      for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], row, column[j]);
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t count = std::min<int64_t>(16, width - 16 * j);
      if (count <= 0) break;
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      float* at = total + i * stride + 16 * j;
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums[i][j]));
    }
  }
}

void add_panels(const void* job, int64_t begin, int64_t end) {
  const Moment& m = *static_cast<const Moment*>(job);
  const bool symmetric = m.left_panels == m.right_panels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = m.panels - 1 - task, column = panel * kPanel;  // the largest one first
    const int64_t last = symmetric ? panel + 1 : m.panels;
    for (int64_t i = 0; i < std::min(last * kPanel, m.columns); i += kTile) {
      const uint32_t* left = m.left_panels + i / kPanel * kPairs * kPanel + i % kPanel;
      add_tile(left, m.right_panels + panel * kPairs * kPanel, m.total + i * m.columns + column, m.columns,
               std::min(kTile, m.columns - i), std::min(kPanel, m.columns - column));
    }
  }
}

}  // namespace
}  // namespace qk
#endif

// total += left^T right; with left == right only the upper triangle is valid. Returns 1 and does nothing if the machine
// does not multiply bfloat16.
QK_EXPORT int32_t qk_moment(const void* left, const void* right, float* total, int64_t rows, int64_t columns, int32_t dtype,
                            int32_t threads) {
#if defined(__AVX512BF16__)
  const int64_t panels = (columns + qk::kPanel - 1) / qk::kPanel, size = panels * qk::kPairs * qk::kPanel;
  std::unique_ptr<uint32_t[]> memory(new uint32_t[left == right ? size : 2 * size]);
  uint32_t* other = left == right ? memory.get() : memory.get() + size;
  for (int64_t first = 0; first < rows; first += 2 * qk::kPairs) {
    qk::Moment job{left, right, total, other, memory.get(), rows, columns, panels, first, dtype};
    qk::parallel_for(panels, 1, threads, qk::pack_panels, &job);
    qk::parallel_for(panels, 1, threads, qk::add_panels, &job);
  }
  return 0;
#else
  (void)left, (void)right, (void)total, (void)rows, (void)columns, (void)dtype, (void)threads;
  return 1;
#endif
}

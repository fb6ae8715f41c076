// Sums of outer products over tokens, left^T right, of rows rounded to bfloat16 and added in float32.
//
// Rows are packed into panels of kPanel columns with two rows per word, which is the operand of one instruction: 16 columns x 2
// rows. A tile of 4 x 64 sums stays in registers while it moves down a panel. A product of
// two bfloat16 numbers is exact in float32. Every tile is summed by one thread in order, so the
// number of threads does not change results.
//
// With the tile registers of AMX, 32 x 32 sums stay in four of them. The left operand of a tile product has a column's pairs of
// rows side by side: a panel is transposed before it is the left one. More rows go into a panel, because all sums are read and
// written once per panel, which is what would take the time otherwise.
#include <algorithm>
#include <memory>

#include "parallel.h"
#include "tiles.h"
#include "vector.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512BF16__)
namespace qk {
namespace {

constexpr int64_t kPanel = 64, kTile = 4;
constexpr int64_t kPairs = 64;       // pairs of rows of a panel: 16 KiB, half a first-level cache
constexpr int64_t kTilePairs = 256;  // the same with tiles: 64 KiB, of which the second-level cache holds many

struct Moment {
  const void *left, *right;  // (rows, columns)
  float* total;              // (columns, columns)
  uint32_t *left_panels, *right_panels;
  int64_t rows, columns, panels, pairs, first;  // rows first .. first + 2 pairs are packed
  int32_t dtype;
};

void pack_panel(const Moment& m, const void* rows, int64_t panel, uint32_t* to) {
  const int64_t count = m.rows, columns = m.columns, first = m.first;
  const int32_t dtype = m.dtype;
  const int64_t begin = panel * kPanel, width = std::min(kPanel, columns - begin);
  for (int64_t pair = 0; pair < m.pairs; ++pair, to += kPanel) {
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
    const int64_t at = panel * m.pairs * kPanel;
    pack_panel(m, m.right, panel, m.right_panels + at);
    if (m.left_panels != m.right_panels) pack_panel(m, m.left, panel, m.left_panels + at);
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

#if defined(QK_HAS_TILES)
// A panel [pair][column] as [16 pairs][column][pair of the 16]
void transpose_panel(const uint32_t* from, int64_t pairs, uint32_t* to) {
  for (int64_t block = 0; block < pairs; block += 16) {
    for (int64_t column = 0; column < kPanel; ++column) {
      for (int64_t pair = 0; pair < 16; ++pair) to[(block * kPanel) + column * 16 + pair] = from[(block + pair) * kPanel + column];
    }
  }
}

void add_sums(const float* sums, float* total, int64_t stride, int64_t height, int64_t width) {
  for (int64_t i = 0; i < std::min<int64_t>(16, height); ++i) {
    const int64_t count = std::min<int64_t>(16, width);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    float* at = total + i * stride;
    _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), _mm512_load_ps(sums + 16 * i)));
  }
}

// total[32 rows][32 columns] += the sum over all pairs
void add_tiles(const uint32_t* left, const uint32_t* right, int64_t pairs, float* total, int64_t stride, int64_t height, int64_t width) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < pairs; block += 16) {
    const uint32_t *a = left + block * kPanel, *b = right + block * kPanel;
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + 256, 64);
    _tile_loadd(6, b, 4 * kPanel);
    _tile_loadd(7, b + 16, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][256];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (height > 16 * i && width > 16 * j) add_sums(sums[2 * i + j], total + 16 * i * stride + 16 * j, stride, height - 16 * i, width - 16 * j);
    }
  }
}

// Products of whole panels; a thread transposes the left panel that it works on.
void add_panels_by_tiles(const void* job, int64_t begin, int64_t end) {
  const Moment& m = *static_cast<const Moment*>(job);
  const bool symmetric = m.left_panels == m.right_panels;
  const int64_t size = m.pairs * kPanel;
  const Tiles tiles(kTileRows, kTileBytes);
  std::unique_ptr<uint32_t[]> memory(new uint32_t[size]);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = m.panels - 1 - task, row = panel * kPanel;  // the largest one first
    transpose_panel(m.left_panels + panel * size, m.pairs, memory.get());
    written(memory.get());
    for (int64_t other = symmetric ? panel : 0; other < m.panels; ++other) {
      const int64_t column = other * kPanel;
      for (int64_t i = 0; i < std::min(kPanel, m.columns - row); i += 32) {
        for (int64_t j = 0; j < std::min(kPanel, m.columns - column); j += 32) {
          add_tiles(memory.get() + 16 * i, m.right_panels + other * size + j, m.pairs, m.total + (row + i) * m.columns + column + j,
                    m.columns, m.columns - row - i, m.columns - column - j);
        }
      }
    }
  }
}
#endif

}  // namespace
}  // namespace qk
#endif

// total += left^T right; with left == right only the upper triangle is valid. Returns 1 and does nothing if the machine
// does not multiply bfloat16.
QK_EXPORT int32_t qk_moment(const void* left, const void* right, float* total, int64_t rows, int64_t columns, int32_t dtype,
                            int32_t threads) {
#if defined(__AVX512BF16__)
  qk::RangeBody add = qk::add_panels;
  int64_t pairs = qk::kPairs;
#if defined(QK_HAS_TILES)
  if (qk::tiles_granted()) add = qk::add_panels_by_tiles, pairs = qk::kTilePairs;
#endif
  const int64_t panels = (columns + qk::kPanel - 1) / qk::kPanel, size = panels * pairs * qk::kPanel;
  std::unique_ptr<uint32_t[]> memory(new uint32_t[left == right ? size : 2 * size]);
  uint32_t* other = left == right ? memory.get() : memory.get() + size;
  for (int64_t first = 0; first < rows; first += 2 * pairs) {
    qk::Moment job{left, right, total, other, memory.get(), rows, columns, panels, pairs, first, dtype};
    qk::parallel_for(panels, 1, threads, qk::pack_panels, &job);
    qk::parallel_for(panels, 1, threads, add, &job);
  }
  return 0;
#else
  (void)left, (void)right, (void)total, (void)rows, (void)columns, (void)dtype, (void)threads;
  return 1;
#endif
}

// A thread's share of a product on tile registers, for int8 and for bfloat16 activations.
//
// Two units of outputs are multiplied with up to 32 rows of x at a time. The weights of these units are unpacked, a panel of columns
// at a time, to scratch memory that stays in the level-1 cache while all rows of x are processed; those that are pairs already are
// read where they are. The sums of a chunk of columns are scaled and added to totals in scratch memory. If rows are not a multiple
// of 16, the last tile begins earlier and computes some rows again; fewer than 16 are one tile of fewer rows. A row's products and
// sums are the same in every tile.
#pragma once
#include "tile.h"
#include "tiles.h"
#if defined(QK_HAS_TILES)

namespace qk {

constexpr int64_t kTilePanelBytes = 1 << 14;  // as much of x passes by, and both fit the level-1 cache
constexpr int64_t kTileSlabBytes = 1 << 20;  // of x, that stay in the level-2 cache while panels change
constexpr int64_t kTileFloats = kPanelUnits * kTileRows * kWidth;  // totals of 16 rows
constexpr int64_t kMostSlabRows = (kShareScratchBytes - kTilePanelBytes) / 4 / kTileFloats * kTileRows;

template <class Number>
using TileSums = Number[kPanelUnits][kTileRows][kWidth];

// Where tiles of weights are read: a unit's words are `step` bytes apart.
struct Weights {
  const uint32_t* words[kPanelUnits];
  int64_t step;
};

// Zero the sums of R tiles of rows.
template <int R>
inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (R == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Load R tiles of x, the second 16 rows after the first, and those of two units.
template <int R>
inline void load_tiles(const void* x, int64_t x_stride, const Weights& w) {
  _tile_loadd(4, x, x_stride);
  if constexpr (R == 2) _tile_loadd(5, static_cast<const char*>(x) + kTileRows * x_stride, x_stride);
  _tile_loadd(6, w.words[0], w.step);
  _tile_loadd(7, w.words[1], w.step);
}

template <int R, class Number>
inline void store_tiles(TileSums<Number>* sums) {
  _tile_stored(0, sums[0][0], kTileBytes);
  _tile_stored(1, sums[0][1], kTileBytes);
  if constexpr (R == 2) {
    _tile_stored(2, sums[1][0], kTileBytes);
    _tile_stored(3, sums[1][1], kTileBytes);
  }
}

// Rows [row, last) of x, 32 or 16 at a time: call f(tile, tiles of rows) with t.row and t.totals set.
template <class F>
inline void each_tile_row(const Rows& r, Tile& t, int64_t row, int64_t last, float* totals, F f) {
  for (t.totals = totals; row < last;) {
    const int count = last - row >= 2 * kTileRows ? 2 : 1;
    t.row = last - row >= kTileRows || r.m < kTileRows ? row : last - kTileRows;
    f(count);
    row += count * kTileRows, t.totals += count * kTileFloats;
  }
}

template <class Path>
void tile_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  static_assert(kParts == 1, "a register is as wide as a block of rows");
  const Chunks chunks(l, Path::chunk(l, r));
  const int rows = static_cast<int>(r.m < kTileRows ? r.m : kTileRows);
  const Tiles tiles(rows, tile_piece(chunks.length * Path::kBytes));
  uint32_t* panel = static_cast<uint32_t*>(scratch);
  float* totals = reinterpret_cast<float*>(static_cast<char*>(scratch) + kTilePanelBytes);
  const int64_t fit = kTilePanelBytes / 4 / kPanelWidth * Path::kPanelColumns / chunks.length, most = fit > 1 ? fit : 1;
  int64_t slab = kTileSlabBytes / (Path::kBytes * l.columns) / (2 * kTileRows) * (2 * kTileRows);
  slab = slab < 2 * kTileRows ? 2 * kTileRows : slab < kMostSlabRows ? slab : kMostSlabRows;
  for (int64_t row = 0; row < r.m; row += slab) {
    const int64_t last = row + slab < r.m ? row + slab : r.m, tile_rows = round_up(last - row, kTileRows) / kTileRows;
    for (int64_t unit = begin; unit < end; unit += kPanelUnits) {
      memset(totals, 0, static_cast<size_t>(tile_rows * kTileFloats) * sizeof(float));
      Tile t{panel, unit, end, row, 0, 0, totals, nullptr};
      for (t.first = 0; t.first < chunks.count; t.first = t.last) {
        t.last = t.first + most < chunks.count ? t.first + most : chunks.count;
        const Weights from = Path::weights(l, chunks, t, panel);
        written(panel);
        each_tile_row(r, t, row, last, totals, [&](int count) {
          if (count == 2) Path::template tile<2>(l, r, chunks, t, from, kTileRows);
          else Path::template tile<1>(l, r, chunks, t, from, rows);
        });
      }
      each_tile_row(r, t, row, last, totals, [&](int count) {
        for (int i = 0; i < count; ++i, t.row += kTileRows, t.totals += kTileFloats) {
          Tile one = t;
          store_tile(l, Path::factors(l, r), one, kPanelUnits, rows, y, y_stride);
        }
        t.totals -= count * kTileFloats;
      });
    }
  }
}

}  // namespace qk
#endif

// Products with bfloat16 activations.
#include "float_path.h"
#include "tile_share.h"

namespace qk {
namespace {

#if defined(QK_HAS_TILES)
// Products on tiles: a processor that has them multiplies bfloat16 numbers only there, for any number of rows, so that a row has
// the same bits in all of them.
template <int SOURCE>
struct TilePairs : FloatPath<SOURCE> {
  using Base = FloatPath<SOURCE>;

  static Weights weights(const Linear& l, const Chunks& chunks, const Tile& t, uint32_t* panel) {
    if constexpr (SOURCE == kPairs) {
      const int64_t at = chunks.stored_column(t.first) / 2 * kLanes;
      return {{Base::words_of(l, t.unit) + at, Base::words_of(l, unit_of(t, 1)) + at}, kLanes * 4};
    }
    Base::unpack(l, chunks, t, panel);
    return {{panel, panel + kWidth}, kPanelWidth * 4};
  }

  // One row: a tile's arithmetic with vectors, which read packed codes faster. The products of the first columns of 16 pairs are
  // summed, then those of the second ones, and both sums are added to that of the chunk (Intel's manual, TDPBF16PS).
  static void one_row(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t, const float* x) {
    const Rest rest(l, r);
    const Table* table = l.table ? l.table : &kWhole;
    const int64_t low_plane = kBoth<SOURCE> ? words_per_plane(l) : 0, piece = tile_piece(chunks.length * 2) / 2;
    const uint32_t* words[kPanelUnits];
    Scales scales[kPanelUnits];
    for (int u = 0; u < kPanelUnits; ++u) words[u] = Base::words_of(l, unit_of(t, u)), scales[u] = Scales(l, unit_of(t, u));
    for (Walk walk(chunks, 0); walk.chunk < chunks.count; walk.next()) {
      Floats sum[kPanelUnits] = {};
      for (int64_t k = 0; k < walk.columns(); k += piece) {
        Floats first[kPanelUnits] = {}, second[kPanelUnits] = {};
        for (int64_t c = 0; c < piece; c += kColumns<SOURCE>, x += kColumns<SOURCE>) {
#pragma GCC unroll 2
          for (int u = 0; u < kPanelUnits; ++u) {
            __builtin_prefetch(words[u] + kFloatAhead);
            if (kBoth<SOURCE>) __builtin_prefetch(words[u] + low_plane + kFloatAhead);
            Packed<SOURCE> packed;
            packed.load(words[u], low_plane);
            words[u] += kLanes;
#pragma GCC unroll 8
            for (int step = 0; step < kSteps<SOURCE>; ++step) {
              const Words pair = (Words)decode(packed, step, nullptr, table);
              first[u] = multiply_add((Floats)(pair << 16), splat(x[2 * step]), first[u]);
              second[u] = multiply_add((Floats)(pair & 0xffff0000u), splat(x[2 * step + 1]), second[u]);
            }
          }
        }
        for (int u = 0; u < kPanelUnits; ++u) sum[u] += first[u] + second[u];
      }
      for (int u = 0; u < kPanelUnits; ++u) {
        const Floats scale = l.scales ? scales[u].scale(walk.group) : splat(1.0f);
        Floats* total = reinterpret_cast<Floats*>(t.totals + u * kWidth);
        *total = multiply_add(scale, sum[u], *total);
        if (rest.any) *total = multiply_add(rest(scales[u], walk.group, scale), splat(r.total[walk.chunk]), *total);
      }
    }
  }

  // The one row of x, which is made floats first.
  static void share_of_one(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
    const Chunks chunks(l, Base::chunk(l, r));
    float* x = static_cast<float*>(scratch);
    for (int64_t k = 0; k < rows_padded(r); k += kWidth) *reinterpret_cast<Floats*>(x + k) = load_bfloats(r.pairs + k);
    for (int64_t unit = begin; unit < end; unit += kPanelUnits) {
      alignas(64) float totals[kPanelUnits * kWidth] = {};
      const Tile t{nullptr, unit, end, 0, 0, chunks.count, totals, nullptr};
      one_row(l, r, chunks, t, x);
      store_tile(l, Base::factors(l, r), t, kPanelUnits, 1, y, y_stride);
    }
  }

  // R tiles of `rows` rows of x.
  template <int R>
  static void tile(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t, Weights w, int rows) {
    const int64_t stride = rows_pairs_stride(r), piece = tile_piece(chunks.length * 2), words = piece / 4 * (w.step / 4);
    const uint16_t* x = r.pairs + t.row * stride + chunks.stored_column(t.first);
    const Rest rest(l, r);
    Scales scales[kPanelUnits];
    for (int u = 0; u < kPanelUnits; ++u) scales[u] = Scales(l, unit_of(t, u));
    for (Walk walk(chunks, t.first); walk.chunk < t.last; walk.next()) {
      zero_tiles<R>();
      for (int64_t k = 0; k < walk.columns(); k += piece / 2, x += piece / 2, w.words[0] += words, w.words[1] += words) {
        load_tiles<R>(x, stride * 2, w);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (R == 2) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      alignas(64) TileSums<float> sums[R];
      store_tiles<R, float>(sums);
      for (int u = 0; u < kPanelUnits; ++u) {
        const Floats scale = l.scales ? scales[u].scale(walk.group) : splat(1.0f);
        const Floats other = rest.any ? rest(scales[u], walk.group, scale) : Floats{};
        for (int i = 0; i < R; ++i) {
          float* totals = t.totals + i * kTileFloats + u * rows * kWidth;
#pragma GCC unroll 4
          for (int m = 0; m < rows; ++m) {
            Floats* total = reinterpret_cast<Floats*>(totals + m * kWidth);
            *total = multiply_add(scale, *reinterpret_cast<const Floats*>(sums[i][u][m]), *total);
          }
          if (!rest.any) continue;
          const float* x_total = r.total + walk.chunk * r.m + t.row + i * kTileRows;
#pragma GCC unroll 4
          for (int m = 0; m < rows; ++m) {
            Floats* total = reinterpret_cast<Floats*>(totals + m * kWidth);
            *total = multiply_add(other, splat(x_total[m]), *total);
          }
        }
      }
    }
  }
};
#endif

template <int SOURCE>
void share_pairs(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
#if defined(QK_HAS_TILES)  // without permission to use them no rows have this form
  if (r.m == 1 && rows_pairs_stride(r) * 4 <= kShareScratchBytes)
    return TilePairs<SOURCE>::share_of_one(l, r, y, y_stride, begin, end, scratch);
  tile_share<TilePairs<SOURCE>>(l, r, y, y_stride, begin, end, scratch);
#else
  share<FloatPath<SOURCE>>(l, r, y, y_stride, begin, end, scratch);
#endif
}

}  // namespace

void pairs_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  if constexpr (kDotPairs) {  // else no rows have such a form
    const KeepSubnormals keep;
    switch (l.kind) {
      case kWeightBFloat16: return share_pairs<kPairs>(l, r, y, y_stride, begin, end, scratch);
      case kWeightU4:
      case kWeightT4: return share_pairs<kNibblePairs>(l, r, y, y_stride, begin, end, scratch);
      case kWeightF8: return share_pairs<kFloat8Pairs>(l, r, y, y_stride, begin, end, scratch);
      case kWeightPlanes: return share_pairs<kPlanePairs>(l, r, y, y_stride, begin, end, scratch);
      case kWeightHighPlane: return share_pairs<kHighPlanePairs>(l, r, y, y_stride, begin, end, scratch);
      default: return share_pairs<kBytePairs>(l, r, y, y_stride, begin, end, scratch);
    }
  }
}

}  // namespace qk

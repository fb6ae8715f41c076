// Products with int8 activations: unsigned codes times int8 activations, summed exactly in int32 over a block of activations,
// then total += (sum - zero * sum(q)) * (weight scale * activation scale) in float32, block after block; and the weight's offset
// times sum(q) * activation scale, where there are offsets. Codes of a table are looked up: its numbers, as bytes.
#include "dot.h"
#include "tile_share.h"

namespace qk {
namespace {

// packed U4, U8, Planes, HighPlane and T4, and what they are unpacked to, a byte per code
enum Source { kNibbles, kBytes, kPlanes, kHighPlane, kTable, kNarrowPanel, kWidePanel, kHighPanel };

template <int SOURCE>
constexpr bool kWide = SOURCE != kNibbles && SOURCE != kNarrowPanel;
template <int SOURCE>
constexpr bool kEight = SOURCE == kNibbles || SOURCE == kTable || SOURCE == kPlanes || SOURCE == kHighPlane;  // columns a word, else 4
template <int SOURCE>
constexpr int32_t kMiddle = SOURCE == kHighPlane || SOURCE == kHighPanel ? kHighPlaneMiddle : 0;

// Operands of the dot product from a word of eight columns; `apart`: from the high plane to the low one.
template <int SOURCE>
inline void load_codes(const Linear& l, const uint32_t* words, int64_t apart, Codes* code) {
  const Words word = *reinterpret_cast<const WordsAnywhere*>(words);
  if (SOURCE == kTable) {
    code[0] = codes<true>(look_up_bytes(word & 0x0f0f0f0fu, l.table->byte));
    code[1] = codes<true>(look_up_bytes((word >> 4) & 0x0f0f0f0fu, l.table->byte));
    return;
  }
  if (SOURCE == kNibbles) {
    code[0] = codes<false>(word & 0x0f0f0f0fu);
    code[1] = codes<false>((word >> 4) & 0x0f0f0f0fu);
    return;
  }
  Bytes bytes = high_codes(word);
  if (SOURCE == kPlanes) {
    bytes = join_planes(word, *reinterpret_cast<const WordsAnywhere*>(words + apart));
    __builtin_prefetch(words + apart + kAhead);
  }
  code[0] = codes<true>(bytes.word[0]);
  code[1] = codes<true>(bytes.word[1]);
}

// The part of a block's sum that does not depend on codes.
template <int M>
inline void add_offset(Floats offset, const float* x_scale, const int32_t* x_sum, float* totals) {
  for (int m = 0; m < M; ++m) {
    FloatsAnywhere* total = reinterpret_cast<FloatsAnywhere*>(totals + m * kWidth);
    *total = multiply_add(offset, splat(x_scale[m] * static_cast<float>(x_sum[m])), *total);
  }
}

// UNITS registers of outputs for M rows of x. `words` advance by `step` from one word of a unit to the next.
template <int SOURCE, int M, int UNITS>
inline void multiply(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t, const uint32_t* const* start) {
  constexpr bool kPanel = SOURCE >= kNarrowPanel;
  constexpr int kStep = kPanel ? UNITS * kWidth : kLanes;
  constexpr int kSplit = M * UNITS <= 4 ? 2 : 1;  // independent sums per output, to hide the latency of a dot product
  const int64_t stride = rows_q_stride(r), apart = SOURCE == kPlanes ? words_per_plane(l) : 0;
  const uint32_t* words[UNITS];
  const Zeros zeros(l);
  const uint8_t* zero[UNITS];
  Scales scales[UNITS];
#pragma GCC unroll 8
  for (int u = 0; u < UNITS; ++u) {
    words[u] = start[u];
    scales[u] = Scales(l, unit_of(t, u));
    zero[u] = zeros.at(scales[u].at);
  }
  const int8_t* q = r.q + t.row * stride + chunks.stored_column(t.first);
  const float* x_scale = r.scale + t.first * r.m + t.row;
  const int32_t* x_sum = r.sum + t.first * r.m + t.row;
  for (Walk walk(chunks, t.first); walk.chunk < t.last; walk.next(), x_scale += r.m, x_sum += r.m) {
    Floats scale[UNITS];
#pragma GCC unroll 8
    for (int u = 0; u < UNITS; ++u) {
      scale[u] = scales[u].scale(walk.group);
      if (kPanel) asm("" : "+m"(scale[u]));  // not in a register meanwhile: sums need all of them
    }
    Ints sum[UNITS][M][kSplit] = {};
    const int8_t* const stop = q + walk.columns();
    for (; q < stop; q += 8) {
#pragma GCC unroll 2
      for (int half = 0; half < (kEight<SOURCE> ? 1 : 2); ++half) {
        Codes code[UNITS][2];
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; ++u) {
          if (!kPanel) __builtin_prefetch(words[u] + kAhead);
          if constexpr (kEight<SOURCE>) load_codes<SOURCE>(l, words[u], apart, code[u]);
          else code[u][0] = codes<kWide<SOURCE>>(*reinterpret_cast<const WordsAnywhere*>(words[u]));
          words[u] += kStep;
        }
#pragma GCC unroll 2
        for (int part = 0; part < (kEight<SOURCE> ? 2 : 1); ++part) {
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            const Ints x = splat_four(q + (m / 3 * 3) * stride + (m % 3) * stride + 4 * (half + part));
#pragma GCC unroll 8
            for (int u = 0; u < UNITS; ++u) {
              Ints& s = sum[u][m][(half + part) % kSplit];
              s = dot<kWide<SOURCE>>(s, code[u][part], x);
            }
          }
        }
      }
    }
    float* totals = t.totals;
    asm("" : "+r"(totals));  // prevents the compiler from keeping the totals of all chunks in registers, of which there are too few
#pragma GCC unroll 8
    for (int u = 0; u < UNITS; ++u) {
      const Ints minus_zero = (kDotOffset<kWide<SOURCE>> + kMiddle<SOURCE> - load_bytes(zero[u] + walk.group * zeros.step)) & 0xffff;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        Ints all = sum[u][m][0];
        if (kSplit == 2) all += sum[u][m][1];
        all = add_product(all, minus_zero, splat_int(x_sum[m]));
        FloatsAnywhere* total = reinterpret_cast<FloatsAnywhere*>(totals + (u * M + m) * kWidth);
        *total = multiply_add(to_floats(all), scale[u] * splat(x_scale[m]), *total);
      }
    }
    if (!l.offsets) continue;
    for (int u = 0; u < UNITS; ++u) add_offset<M>(scales[u].offset(walk.group), x_scale, x_sum, totals + u * M * kWidth);
  }
}

template <int SOURCE>
struct Int8Path {
  static constexpr int kBytes = 1, kPanelColumns = 4;  // bytes per activation; columns per word of a panel
  static constexpr int kRows = kPanelRows;
  static constexpr int64_t kDirectRows = kSomeRows;
  static constexpr int kColumns = kEight<SOURCE> ? 8 : 4;
  static constexpr int kPanel = SOURCE == kNibbles ? kNarrowPanel : SOURCE == kHighPlane ? kHighPanel : kWidePanel;

  static Factors factors(const Linear& l, const Rows&) { return {l.table ? l.factor * l.table->unit : l.factor, nullptr}; }

  static int64_t chunk(const Linear&, const Rows& r) { return r.block; }

  static const uint32_t* words_of(const Linear& l, int64_t unit) {
    return static_cast<const uint32_t*>(l.codes) + unit / kParts * words_per_block(l, kColumns) + unit % kParts * kWidth;
  }

  template <int M>
  static void direct(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t) {
    const uint32_t* words[kDirectUnits];
    for (int u = 0; u < kDirectUnits; ++u) words[u] = words_of(l, unit_of(t, u));
    multiply<SOURCE, M, kDirectUnits>(l, r, chunks, t, words);
  }

  template <int M>
  static void panel(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t) {
    const uint32_t* words[kPanelUnits];
    for (int u = 0; u < kPanelUnits; ++u) words[u] = t.words + u * kWidth;
    multiply<kPanel, M, kPanelUnits>(l, r, chunks, t, words);
  }

  static void unpack(const Linear& l, const Chunks& chunks, const Tile& t, uint32_t* out) {
    const int64_t from = chunks.stored_column(t.first), stop = chunks.stored_column(t.last);
    const int64_t apart = SOURCE == kPlanes ? words_per_plane(l) : 0;
    for (int u = 0; u < kPanelUnits; ++u) {
      const uint32_t* words = words_of(l, unit_of(t, u)) + from / kColumns * kLanes;
      uint32_t* to = out + u * kWidth;
      for (int64_t k = from; k < stop; k += kColumns, words += kLanes) {
        const Words word = *reinterpret_cast<const WordsAnywhere*>(words);
        Bytes bytes{{word, word}};
        if (SOURCE == kNibbles || SOURCE == kTable) bytes = {{word & 0x0f0f0f0fu, (word >> 4) & 0x0f0f0f0fu}};
        if (SOURCE == kTable)
          for (Words& one : bytes.word) one = look_up_bytes(one, l.table->byte);
        if (SOURCE == kHighPlane) bytes = high_codes(word);
        if (SOURCE == kPlanes) bytes = join_planes(word, *reinterpret_cast<const WordsAnywhere*>(words + apart));
        for (int i = 0; i < (kEight<SOURCE> ? 2 : 1); ++i, to += kPanelWidth) *reinterpret_cast<WordsAnywhere*>(to) = bytes.word[i];
      }
    }
  }
};

#if defined(QK_HAS_TILES)
// Products on tiles. Sums are whole numbers, so they equal those of vectors, and so do the totals. Codes of 4 bits lose their zero
// points while they are unpacked and are signed from then on.
template <int SOURCE>
struct TilePath : Int8Path<SOURCE> {
  static constexpr bool kSigned = SOURCE == kNibbles;

  static Weights weights(const Linear& l, const Chunks& chunks, const Tile& t, uint32_t* panel) {
    Int8Path<SOURCE>::unpack(l, chunks, t, panel);
    if (kSigned) subtract_zeros(l, chunks, t, panel);
    return {{panel, panel + kWidth}, kPanelWidth * 4};
  }

  static void subtract_zeros(const Linear& l, const Chunks& chunks, const Tile& t, uint32_t* panel) {
    typedef int8_t Small __attribute__((vector_size(kWidth * 4), aligned(4)));
    const Zeros zeros(l);
    for (int u = 0; u < kPanelUnits; ++u) {
      const uint8_t* zero = zeros.at(scale_of(l, unit_of(t, u)));
      uint32_t* words = panel + u * kWidth;
      for (Walk walk(chunks, t.first); walk.chunk < t.last; walk.next()) {
        const Small four = (Small)((Words)load_bytes(zero + walk.group * zeros.step) * 0x01010101u);
        for (int64_t k = 0; k < walk.columns(); k += 4, words += kPanelWidth) *reinterpret_cast<Small*>(words) -= four;
      }
    }
  }

  template <int R>
  static void multiply(const void* x, int64_t stride, const Weights& w) {
    load_tiles<R>(x, stride, w);
    if constexpr (kSigned) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if constexpr (R == 2) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if constexpr (R == 2) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
  }

  // R tiles of `rows` rows of x.
  template <int R>
  static void tile(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t, Weights w, int rows) {
    const int64_t stride = rows_q_stride(r), piece = tile_piece(chunks.length), words = piece / 4 * (w.step / 4);
    const int8_t* q = r.q + t.row * stride + chunks.stored_column(t.first);
    const float* x_scale = r.scale + t.first * r.m + t.row;
    const int32_t* x_sum = r.sum + t.first * r.m + t.row;
    const Zeros zeros(l);
    Scales scales[kPanelUnits];
    for (int u = 0; u < kPanelUnits; ++u) scales[u] = Scales(l, unit_of(t, u));
    for (Walk walk(chunks, t.first); walk.chunk < t.last; walk.next(), x_scale += r.m, x_sum += r.m) {
      zero_tiles<R>();
      for (int64_t k = 0; k < walk.columns(); k += piece, q += piece, w.words[0] += words, w.words[1] += words)
        multiply<R>(q, stride, w);
      alignas(64) TileSums<int32_t> sums[R];
      store_tiles<R, int32_t>(sums);
      for (int u = 0; u < kPanelUnits; ++u) {
        const Floats scale = scales[u].scale(walk.group);
        const Ints minus_zero = kMiddle<SOURCE> - load_bytes(zeros.at(scales[u].at) + walk.group * zeros.step);
        for (int i = 0; i < R; ++i) {
          float* totals = t.totals + i * kTileFloats + u * rows * kWidth;
#pragma GCC unroll 4
          for (int m = 0; m < rows; ++m) {
            Ints all = *reinterpret_cast<const Ints*>(sums[i][u][m]);
            if (!kSigned) all = add_product(all, minus_zero & 0xffff, splat_int(x_sum[i * kTileRows + m]));
            Floats* total = reinterpret_cast<Floats*>(totals + m * kWidth);
            *total = multiply_add(to_floats(all), scale * splat(x_scale[i * kTileRows + m]), *total);
          }
          if (!l.offsets) continue;
          const Floats offset = scales[u].offset(walk.group);
          for (int m = 0; m < rows; ++m) add_offset<1>(offset, x_scale + i * kTileRows + m, x_sum + i * kTileRows + m, totals + m * kWidth);
        }
      }
    }
  }
};
#endif

constexpr int64_t kFewestTileRows = 2 * kTileRows;  // of x, with which tiles are faster than vectors

template <int SOURCE>
void share_codes(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
#if defined(QK_HAS_TILES)
  if (r.m >= kFewestTileRows && tiles_granted() && fits_tiles(l.group, r.block, 1))
    return tile_share<TilePath<SOURCE>>(l, r, y, y_stride, begin, end, scratch);
#endif
  share<Int8Path<SOURCE>>(l, r, y, y_stride, begin, end, scratch);
}

}  // namespace

void int8_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  switch (l.kind) {
    case kWeightU4: return share_codes<kNibbles>(l, r, y, y_stride, begin, end, scratch);
    case kWeightPlanes: return share_codes<kPlanes>(l, r, y, y_stride, begin, end, scratch);
    case kWeightHighPlane: return share_codes<kHighPlane>(l, r, y, y_stride, begin, end, scratch);
    case kWeightT4: return share_codes<kTable>(l, r, y, y_stride, begin, end, scratch);
    default: return share_codes<kBytes>(l, r, y, y_stride, begin, end, scratch);
  }
}

}  // namespace qk

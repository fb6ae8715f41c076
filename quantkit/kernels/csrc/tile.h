// How a thread's share of a product is split into tiles, for int8 and for float activations.
//
// A tile is a few registers ("units") of output rows times a few rows of x. With few rows of x, a tile reads the packed weight
// directly, along all of K, one tile of rows after the other. With many, the weights of a tile are unpacked, a panel of columns at a time, to scratch
// memory that stays in the level-2 cache while all rows of x are processed. Sums have the same order in both cases: the sum of
// a chunk of columns is scaled and added to the total.
#pragma once
#include "linear.h"
#include "vector.h"

namespace qk {

constexpr int kPanelUnits = 2;                             // units of a tile that reads a panel
constexpr int kPanelWidth = kPanelUnits * kWidth;          // its output rows
constexpr int kPanelRows = kManyRegisters ? 12 : 4;        // its rows of x, at most, where they are vectors
constexpr int kFewRows = kManyRegisters ? 8 : 4;            // rows of x of a tile that reads the packed weight
constexpr int64_t kSomeRows = kManyRegisters ? 64 : 4;      // up to this many rows, tiles read it: a unit stays in the cache
constexpr int kDirectUnits = kParts < 2 ? kParts : 2;       // units of a tile that reads the packed weight: one stream
constexpr int64_t kChunk = 256;                            // columns of a long group of floats that are summed separately
constexpr int64_t kAhead = 1024;                           // words of the packed weight that are fetched ahead of their use
constexpr int64_t kPanelBytes = kWidth == 4 ? 1 << 15 : 1 << 16;
constexpr int64_t kSpareStride = kPanelBytes / 4 / kPanelWidth + 16;  // a panel's columns of float x, for a copy of them
constexpr int64_t kSpareBytes = kPanelRows * kSpareStride * 4;
constexpr int64_t kSlabRows = (kShareScratchBytes - kPanelBytes - kSpareBytes) / 4 / kPanelWidth / kPanelRows * kPanelRows;
static_assert(kSlabRows >= 2 * kPanelRows, "a panel, spare columns and totals do not fit the scratch memory");
constexpr int64_t kSlabBytes = 3 << 17;                    // of x, that stay in the level-2 cache while panels change

// Columns in the order they are summed: a group, padded to `padded` columns, is cut into chunks of `length`.
struct Chunks {
  int64_t padded, length, per_group, count;
  Chunks(const Linear& l, int64_t chunk)
      : padded(round_up(l.group, 8)),
        length(chunk < padded ? chunk : padded),
        per_group((padded + length - 1) / length),
        count(l.columns / l.group * per_group) {}
  int64_t stored_column(int64_t chunk) const { return chunk / per_group * padded + chunk % per_group * length; }
};

// A walk over chunks [first, last).
struct Walk {
  const Chunks& chunks;
  int64_t chunk, group, part;
  Walk(const Chunks& c, int64_t first) : chunks(c), chunk(first), group(first / c.per_group), part(first % c.per_group) {}
  int64_t first_column() const { return part * chunks.length; }  // of the group
  int64_t columns() const {                                      // stored ones
    const int64_t left = chunks.padded - first_column();
    return left < chunks.length ? left : chunks.length;
  }
  void next() {
    ++chunk;
    if (++part == chunks.per_group) part = 0, ++group;
  }
};

struct Tile {
  const uint32_t* words;  // where the first chunk begins
  int64_t unit, last_unit;
  int64_t row;  // of x
  int64_t first, last;  // chunks
  float* totals;        // [unit][row of x][kWidth], added to
  void* spare;          // kSpareBytes
};

inline int64_t words_per_block(const Linear& l, int columns_per_word) {
  return l.columns / l.group * round_up(l.group, 8) / columns_per_word * kLanes;
}

// Words from a code's high plane to its low one.
inline int64_t words_per_plane(const Linear& l) { return linear_blocks(l) * words_per_block(l, 8); }

// Eight columns of 8-bit codes, four per word, from their planes. Without the low plane, the mean of what it could add is
// subtracted from the zero point (kHighPlaneMiddle).
struct Bytes {
  Words word[2];
};
constexpr int32_t kHighPlaneMiddle = 8;
inline Bytes high_codes(Words high) { return {{(high << 4) & 0xf0f0f0f0u, high & 0xf0f0f0f0u}}; }
inline Bytes join_planes(Words high, Words low) {
  const Bytes coarse = high_codes(high);
  return {{coarse.word[0] | (low & 0x0f0f0f0fu), coarse.word[1] | ((low >> 4) & 0x0f0f0f0fu)}};
}

// Units past the last one read the last one; their results are not stored.
inline int64_t unit_of(const Tile& t, int u) { return t.unit + u < t.last_unit ? t.unit + u : t.last_unit - 1; }

// Scales and zero points of a unit's first group; a group further is kLanes further.
inline int64_t scale_of(const Linear& l, int64_t unit) {
  return unit / kParts * (l.columns / l.group) * kLanes + unit % kParts * kWidth;
}

// Scales and offsets of a unit by group, without the factor of all. Read before a chunk is summed: sums leave no registers.
class Scales {
 public:
  int64_t at = 0;  // place of the first group
  Scales() = default;
  Scales(const Linear& linear, int64_t unit) : at(scale_of(linear, unit)), linear_(&linear) {
    const int64_t supers = linear.columns / linear.group >> linear.super;
    over_ = unit / kParts * supers * kLanes + unit % kParts * kWidth;
    offsets_over_ = over_ + linear_blocks(linear) * supers * kLanes;
  }
  Floats scale(int64_t group) const { return load(linear_->scales, group, over_); }
  Floats offset(int64_t group) const { return load(linear_->offsets, group, offsets_over_); }

 private:
  const Linear* linear_ = nullptr;
  int64_t over_ = 0, offsets_over_ = 0;  // in `supers`

  Floats load(const void* values, int64_t group, int64_t half) const {
    const Linear& l = *linear_;
    const int64_t place = at + group * kLanes;
    if (l.scale_dtype <= kBFloat16) return load_floats(values, place, l.scale_dtype);
    const uint8_t* bytes = static_cast<const uint8_t*>(values) + place;
    if (l.scale_dtype == kScaleInt8) {
      const Floats whole = to_floats(load_signed_bytes(reinterpret_cast<const int8_t*>(bytes)));
      return whole * load_halves(l.supers + half + (group >> l.super) * kLanes);
    }
    const Words code = (Words)load_bytes(bytes);
    if (l.scale_dtype == kScaleE4M3) return from_e4m3(code << 24);
    return (Floats)(code == 0u ? code + 0x400000u : code << 23);  // 2^-127 is subnormal
  }
};

// Zero points of a unit by group: the stored ones, or always the same one.
struct Zeros {
  alignas(16) uint8_t code[kWidth];
  const uint8_t* stored;
  int64_t step;
  explicit Zeros(const Linear& l) : stored(l.zeros), step(l.zeros ? kLanes : 0) {
    for (uint8_t& c : code) c = static_cast<uint8_t>(l.zero_code);
  }
  const uint8_t* at(int64_t place) const { return step ? stored + place : code; }
};

// What totals are multiplied by.
struct Factors {
  float all;
  const float* row;  // and by row of x, where one was rounded to floats by one scale; or null
};

inline void store_tile(const Linear& l, const Factors& by, const Tile& t, int units, int rows, float* y, int64_t y_stride) {
  const int own = static_cast<int>(t.last_unit - t.unit < units ? t.last_unit - t.unit : units);
  for (int m = 0; m < rows; ++m) {  // a row's units are neighbours in memory
    for (int u = 0; u < own; ++u) {
      const int64_t at = (t.unit + u) * kWidth, count = l.rows - at;
      Floats total = *reinterpret_cast<const FloatsAnywhere*>(t.totals + (u * rows + m) * kWidth) * by.all;
      if (by.row) total *= by.row[t.row + m];
      float* out = y + (t.row + m) * y_stride + at;
      if (count >= kWidth) {
        if (l.bias) total += *reinterpret_cast<const FloatsAnywhere*>(l.bias + at);
        *reinterpret_cast<FloatsAnywhere*>(out) = total;
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = l.bias ? total[i] + l.bias[at + i] : total[i];
      }
    }
  }
}

template <class Path, int M>
void direct_rows(const Linear& l, const Rows& r, const Chunks& chunks, Tile& t, float* y, int64_t y_stride) {
  for (; t.row + M <= r.m; t.row += M) {
    alignas(64) float totals[M * kDirectUnits * kWidth] = {};
    t.totals = totals;
    Path::template direct<M>(l, r, chunks, t);
    store_tile(l, Path::factors(l, r), t, kDirectUnits, M, y, y_stride);
  }
  if constexpr (M > 1) direct_rows<Path, M == 4 ? 3 : M == 3 ? 2 : M / 2>(l, r, chunks, t, y, y_stride);
}

template <class Path>
void direct_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t first, int64_t last) {
  const Chunks chunks(l, Path::chunk(l, r));
  for (int64_t unit = first; unit < last; unit += kDirectUnits) {
    Tile t{nullptr, unit, last, 0, 0, chunks.count, nullptr, nullptr};
    direct_rows<Path, kFewRows>(l, r, chunks, t, y, y_stride);
  }
}

template <class Path, int M>
void panel_rows(const Linear& l, const Rows& r, const Chunks& chunks, Tile& t, int64_t last_row) {
  for (; t.row + M <= last_row; t.row += M, t.totals += M * kPanelWidth) Path::template panel<M>(l, r, chunks, t);
  if constexpr (M > 8)
    panel_rows<Path, 8>(l, r, chunks, t, last_row);
  else if constexpr (M > 1)
    panel_rows<Path, M / 2>(l, r, chunks, t, last_row);
}

// Store the totals of a slab, in the order of panel_rows.
template <int M>
void store_rows(const Linear& l, const Factors& by, Tile& t, float* y, int64_t y_stride, int64_t last_row) {
  for (; t.row + M <= last_row; t.row += M, t.totals += M * kPanelWidth) store_tile(l, by, t, kPanelUnits, M, y, y_stride);
  if constexpr (M > 8)
    store_rows<8>(l, by, t, y, y_stride, last_row);
  else if constexpr (M > 1)
    store_rows<M / 2>(l, by, t, y, y_stride, last_row);
}

template <class Path>
void panel_share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t first, int64_t last, void* scratch) {
  const Chunks chunks(l, Path::chunk(l, r));
  uint32_t* panel = static_cast<uint32_t*>(scratch);
  char* spare = static_cast<char*>(scratch) + kPanelBytes;
  float* totals = reinterpret_cast<float*>(spare + kSpareBytes);
  const int64_t most = kPanelBytes / 4 / kPanelWidth * Path::kPanelColumns / chunks.length;  // chunks of a panel
  constexpr int64_t kRows = Path::kRows, kMost = kSlabRows / kRows * kRows;
  int64_t slab = kSlabBytes / (Path::kBytes * l.columns) / kRows * kRows;
  slab = slab < 2 * kRows ? 2 * kRows : slab < kMost ? slab : kMost;
  for (int64_t row = 0; row < r.m; row += slab) {
    const int64_t last_row = row + slab < r.m ? row + slab : r.m;
    for (int64_t unit = first; unit < last; unit += kPanelUnits) {
      memset(totals, 0, static_cast<size_t>((last_row - row) * kPanelWidth) * sizeof(float));
      Tile t{panel, unit, last, row, 0, 0, totals, spare};
      for (int64_t chunk = 0; chunk < chunks.count; chunk += most) {
        t.first = chunk, t.last = chunk + most < chunks.count ? chunk + most : chunks.count;
        t.row = row, t.totals = totals;
        Path::unpack(l, chunks, t, panel);
        panel_rows<Path, kRows>(l, r, chunks, t, last_row);
      }
      t.row = row, t.totals = totals;
      store_rows<kRows>(l, Path::factors(l, r), t, y, y_stride, last_row);
    }
  }
}

template <class Path>
void share(const Linear& l, const Rows& r, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch) {
  if (r.m <= Path::kDirectRows) return direct_share<Path>(l, r, y, y_stride, begin * kParts, end * kParts);
  panel_share<Path>(l, r, y, y_stride, begin * kParts, end * kParts, scratch);
}

// The kinds of products, in separate files so that they compile in parallel.
void int8_share(const Linear&, const Rows&, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch);
void float_share(const Linear&, const Rows&, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch);
void pairs_share(const Linear&, const Rows&, float* y, int64_t y_stride, int64_t begin, int64_t end, void* scratch);

}  // namespace qk

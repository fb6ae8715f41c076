// Products with float activations: activations, products and sums are float32, weights are exactly (code - zero), and the sum
// of a chunk times its scale is added to the total.
//
// A code becomes a float with one logic instruction: OR-ing its bits, at bit p of the word, into the bits of 2^(23-p)
// gives the float 2^(23-p) + code; subtracting 2^(23-p) + zero is exact and leaves code - zero. That works for every p up to
// 16 (the code must stay in the mantissa), so one shift by 16 is enough for a word.
//
// Products with bfloat16 activations use the same code, two columns at a time: a word of a bfloat16 weight is not decoded to two
// floats but multiplied directly by a word of the activations. Codes become such words: numbers of up to 8 bits are exact in
// bfloat16. Those of 4 bits are looked up, two in an instruction, less the middle code; what a zero point differs from it, times
// the sum of the activations, is added to the total, and so is an offset times that sum.
#pragma once
#include "dot.h"
#include "tile.h"

namespace qk {
namespace {

constexpr int64_t kAliasFloats = 1024;
constexpr int64_t kFloatAhead = 2048;    // words that are fetched ahead of their use

// packed weights, to floats; kBFloats and codes, to pairs; and panels: numbers unpacked, as floats or pairs
enum Source {
  kFloats, kBFloats, kNibbles, kBytes, kPlanes, kHighPlane, kTable, kFloat8,
  kPairs, kNibblePairs, kBytePairs, kPlanePairs, kHighPlanePairs, kFloat8Pairs,
  kPanel, kPairsPanel
};

template <int SOURCE>
constexpr bool kPaired = (SOURCE >= kPairs && SOURCE < kPanel) || SOURCE == kPairsPanel;
template <int SOURCE>
constexpr bool kCodePairs = SOURCE > kPairs && SOURCE < kPanel;

template <int SOURCE>
constexpr bool kBoth = SOURCE == kPlanes || SOURCE == kPlanePairs;  // planes are read
template <int SOURCE>
constexpr bool kHigh = SOURCE == kHighPlane || SOURCE == kHighPlanePairs;
template <int SOURCE>
constexpr bool kSplit = kBoth<SOURCE> || kHigh<SOURCE>;  // a word becomes two words of kBytes
template <int SOURCE>
constexpr bool kFour = SOURCE == kNibbles || SOURCE == kTable || SOURCE == kNibblePairs;  // bits per code
template <int SOURCE>
constexpr bool kEight = SOURCE == kBytes || SOURCE == kFloat8 || SOURCE == kBytePairs || SOURCE == kFloat8Pairs;
template <int SOURCE>
constexpr int kColumns =  // per word
    kFour<SOURCE> || kSplit<SOURCE> ? 8 : kEight<SOURCE> ? 4 : SOURCE == kBFloats || kPaired<SOURCE> ? 2 : 1;
template <int SOURCE>
constexpr int kSteps = kPaired<SOURCE> ? kColumns<SOURCE> / 2 : kColumns<SOURCE>;  // multiplications, and words of x, per word

// Position of a column's code: its bit in the word, or in the word shifted right by 16.
struct Place {
  int bit;
  bool high;
};

template <int SOURCE>
constexpr Place place(int column) {
  const int bit = SOURCE == kNibbles ? column % 4 * 8 + column / 4 * 4 : column * 8;
  return bit > (SOURCE == kNibbles ? 16 : 8) ? Place{bit - 16, true} : Place{bit, false};
}

// The numbers to subtract, by bit / 4.
template <int SOURCE>
inline void load_offsets(const Linear& l, int64_t at, Floats* offsets) {
  if (SOURCE != kNibbles && SOURCE != kBytes && SOURCE != kPlanes && SOURCE != kHighPlane) return;
  Floats zero = l.zeros ? to_floats(load_bytes(l.zeros + at)) : splat(static_cast<float>(l.zero_code));
  if (SOURCE == kHighPlane) zero -= static_cast<float>(kHighPlaneMiddle);
  for (int i = 0; i < (SOURCE == kNibbles ? 5 : 3); ++i) offsets[i] = zero + static_cast<float>(1 << (23 - 4 * i));
}

// A packed word, and the word shifted right by 16; two of each if it is split.
template <int SOURCE>
struct Packed {
  Words word[kSplit<SOURCE> ? 2 : 1], high[kSplit<SOURCE> ? 2 : 1];

  inline void load(const uint32_t* words, int64_t low_plane) {
    word[0] = *reinterpret_cast<const WordsAnywhere*>(words);
    if constexpr (kSplit<SOURCE>) {
      Bytes bytes = high_codes(word[0]);
      if (kBoth<SOURCE>) bytes = join_planes(word[0], *reinterpret_cast<const WordsAnywhere*>(words + low_plane));
      word[0] = bytes.word[0], word[1] = bytes.word[1], high[1] = word[1] >> 16;
    }
    high[0] = word[0] >> 16;
  }
};

template <int SOURCE>
inline Floats decode(Words word, Words high, int column, const Floats* offsets, const Table* table) {
  if constexpr (SOURCE == kFloats || SOURCE >= kPanel) return (Floats)word;
  if constexpr (SOURCE == kTable) return look_up(word >> (column % 4 * 8 + column / 4 * 4), table->number);
  if constexpr (SOURCE == kFloat8) return from_e4m3(word << (24 - 8 * column));
  if constexpr (SOURCE == kBFloats) return (Floats)(column ? word & 0xffff0000u : word << 16);
  const Place p = place<SOURCE>(column);
  const uint32_t mask = (SOURCE == kNibbles ? 15u : 255u) << p.bit, exponent = static_cast<uint32_t>(150 - p.bit) << 23;
  return (Floats)(((p.high ? high : word) & mask) | exponent) - offsets[p.bit / 4];
}

// Two floats whose lower halves are empty, as a pair.
inline Words pair_of(Floats first, Floats second) { return (Words)first >> 16 | ((Words)second & 0xffff0000u); }

// Columns 0 and 2, or 1 and 3, of a word of four codes, as bfloat16.
template <int SOURCE>
inline Words decode_pair(Words word, int step) {
  if (step) word = word >> 8;
  if constexpr (SOURCE == kFloat8Pairs) return pair_of(from_e4m3(word << 24), from_e4m3(word << 8));
  const Words first = (word & 0xffu) | 0x4b000000u, second = (word >> 16 & 0xffu) | 0x4b000000u;  // 2^23 + code
  return pair_of((Floats)first - (0x1p23f + 128.0f), (Floats)second - (0x1p23f + 128.0f));
}

// What step `c` multiplies: a column as floats, or two as a pair.
template <int SOURCE>
inline Floats decode(const Packed<SOURCE>& from, int c, const Floats* offsets, const Table* table) {
  constexpr int kShift[4] = {0, 8, 4, 12};  // columns 0 and 2, 1 and 3, 4 and 6, 5 and 7
  if constexpr (SOURCE == kNibblePairs) return (Floats)look_up_pairs(from.word[0] >> kShift[c], table->pair);
  else if constexpr (SOURCE == kPlanePairs || SOURCE == kHighPlanePairs) return (Floats)decode_pair<kBytePairs>(from.word[c / 2], c % 2);
  else if constexpr (SOURCE == kBytePairs || SOURCE == kFloat8Pairs) return (Floats)decode_pair<SOURCE>(from.word[0], c);
  else if constexpr (SOURCE == kPairs) return (Floats)from.word[0];
  else if constexpr (kSplit<SOURCE>) return decode<kBytes>(from.word[c / 4], from.high[c / 4], c % 4, offsets, table);
  else return decode<SOURCE>(from.word[0], from.high[0], c, offsets, table);
}

// What is multiplied by the sum of the activations: an offset, and a zero point's distance from the code that stands for zero in
// pairs of whole numbers.
struct Rest {
  const Linear& l;
  int32_t middle;  // 0: none is lost
  bool any;
  Rest(const Linear& linear, const Rows& r) : l(linear), middle(0) {
    if (r.form == kFormPairs && l.kind != kWeightT4 && l.kind != kWeightF8)
      middle = l.kind == kWeightU4 ? 8 : l.kind == kWeightHighPlane ? 128 + kHighPlaneMiddle : 128;
    any = l.offsets || (middle && (l.zeros || l.zero_code != middle));
  }
  Floats operator()(const Scales& scales, int64_t group, Floats scale) const {
    const Floats offset = l.offsets ? scales.offset(group) : Floats{};
    if (!middle) return offset;
    const int64_t place = scales.at + group * kLanes;
    const Floats zero = l.zeros ? to_floats(load_bytes(l.zeros + place)) : splat(static_cast<float>(l.zero_code));
    return multiply_add(static_cast<float>(middle) - zero, scale, offset);
  }
};

// U4 as a table, for pairs: the code less 8.
constexpr Table kWhole = {
    {},
    {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
     0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0},
    {}, 1, 1};

// sum + weight * x, of two columns where they are paired.
template <int SOURCE>
inline Floats accumulate(Floats weight, const float* x, Floats sum) {
  if constexpr (!kPaired<SOURCE>) return multiply_add(weight, splat(*x), sum);
  int32_t pair;
  memcpy(&pair, x, 4);
  return dot_pairs((Words)weight, (Words)splat_int(pair), sum);
}

// Sums of UNITS registers of outputs for M rows of x, over STRANDS chunks of columns at the same time. Independent sums hide
// the latency of a multiply-add; chunks of one block of rows are a single stream of memory, whereas other rows would not be.
template <int SOURCE, int M, int UNITS, int STRANDS>
struct Sums {
  static constexpr int kStep = SOURCE >= kPanel ? UNITS * kWidth : kLanes;
  const uint32_t *words[UNITS], *ahead[UNITS];  // what is fetched: in the order of memory, not in that of the strands
  const float* x[STRANDS];
  const Table* table;
  int64_t low_plane;  // words from the high plane to the low plane
  Floats sum[STRANDS][UNITS][M], offsets[STRANDS][UNITS][5];

  // One word of every unit and strand. `apart`: words from one strand to the next; `stride`: floats from one row of x to the
  // next.
  inline void add(int64_t apart, int64_t stride) {
#pragma GCC unroll 8
    for (int s = 0; s < STRANDS; ++s) {
      if (SOURCE < kPanel) {
#pragma GCC unroll 2
        for (int u = 0; u < UNITS; ++u) {
          __builtin_prefetch(ahead[u]);
          if (kBoth<SOURCE>) __builtin_prefetch(ahead[u] + low_plane);
          ahead[u] += kLanes;
        }
      }
      Packed<SOURCE> packed[UNITS];
#pragma GCC unroll 2
      for (int u = 0; u < UNITS; ++u) packed[u].load(words[u] + s * apart, low_plane);
#pragma GCC unroll 8
      for (int c = 0; c < kSteps<SOURCE>; ++c) {
        Floats weight[UNITS];
#pragma GCC unroll 2
        for (int u = 0; u < UNITS; ++u) weight[u] = decode(packed[u], c, offsets[s][u], table);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const float* value = x[s] + (m / 3 * 3) * stride + (m % 3) * stride + c;
#pragma GCC unroll 2
          for (int u = 0; u < UNITS; ++u) sum[s][u][m] = accumulate<SOURCE>(weight[u], value, sum[s][u][m]);
        }
      }
    }
    for (int u = 0; u < UNITS; ++u) words[u] += kStep;
    for (int s = 0; s < STRANDS; ++s) x[s] += kSteps<SOURCE>;
  }
};

struct Columns {  // of M rows of x, from column `first` of the weight on
  const float* x;  // or pairs of columns
  int64_t stride, first;
};

template <int SOURCE>
inline Columns columns_of(const Rows& r, int64_t row) {
  if (!kPaired<SOURCE>) return r.form == kFormFloats ? Columns{r.own + row * r.columns, r.columns, 0} : Columns{r.x + row * r.stride, r.stride, 0};
  const int64_t stride = rows_pairs_stride(r) / 2;
  return {reinterpret_cast<const float*>(r.pairs) + row * stride, stride, 0};
}

struct Unit {  // a register of outputs
  const uint32_t* words;  // where its next chunk begins
  Scales scales;
};

// Process STRANDS chunks from `walk` on, which moves past them. Several are possible only if all chunks have the same size.
template <int SOURCE, int M, int UNITS, int STRANDS>
inline void multiply(const Linear& l, const Rows& r, const Columns& from, const Tile& t, Walk& walk, Unit* units) {
  constexpr int kWord = kPaired<SOURCE> ? 2 : 1;  // columns per word of x
  Sums<SOURCE, M, UNITS, STRANDS> sums;
  const bool padded = r.form == kFormPairs;
  const int64_t stored = walk.columns(), left = round_up(l.group - walk.first_column(), kWord), first = walk.chunk;
  const int64_t own = padded || stored < left ? stored : left, before = padded ? walk.chunks.padded : l.group;
  const Rest rest(l, r);
  Floats scale[STRANDS][UNITS], other[STRANDS][UNITS];
#pragma GCC unroll 8
  for (int s = 0; s < STRANDS; ++s, walk.next()) {
    sums.x[s] = from.x + (walk.group * before + walk.first_column() - from.first) / kWord;
#pragma GCC unroll 2
    for (int u = 0; u < UNITS; ++u) {
      scale[s][u] = l.scales ? units[u].scales.scale(walk.group) : splat(1.0f);
      if (rest.any) other[s][u] = rest(units[u].scales, walk.group, scale[s][u]);
      load_offsets<SOURCE>(l, units[u].scales.at + walk.group * kLanes, sums.offsets[s][u]);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) sums.sum[s][u][m] = Floats{};
    }
  }
  for (int u = 0; u < UNITS; ++u) sums.words[u] = units[u].words, sums.ahead[u] = units[u].words + kFloatAhead;
  sums.table = l.table ? l.table : &kWhole;
  sums.low_plane = kBoth<SOURCE> ? words_per_plane(l) : 0;
  const int64_t apart = stored / kColumns<SOURCE> * sums.kStep;
  int64_t k = 0;
  for (; k + kColumns<SOURCE> <= own; k += kColumns<SOURCE>) sums.add(apart, from.stride);
  if (!kPaired<SOURCE> && STRANDS == 1 && k < own) {  // a word that is partly padding
    float tail[M][8] = {};
    for (int m = 0; m < M; ++m)
      for (int64_t c = 0; k + c < own; ++c) tail[m][c] = sums.x[0][m * from.stride + c];
    sums.x[0] = tail[0];
    sums.add(apart, 8);
  }
#pragma GCC unroll 2
  for (int u = 0; u < UNITS; ++u) units[u].words += STRANDS * apart;
#pragma GCC unroll 2
  for (int u = 0; u < UNITS; ++u) {
#pragma GCC unroll 8
    for (int s = 0; s < STRANDS; ++s) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        FloatsAnywhere* total = reinterpret_cast<FloatsAnywhere*>(t.totals + (u * M + m) * kWidth);
        *total = multiply_add(scale[s][u], sums.sum[s][u][m], *total);
      }
      if (!rest.any) continue;
      for (int m = 0; m < M; ++m) {
        FloatsAnywhere* total = reinterpret_cast<FloatsAnywhere*>(t.totals + (u * M + m) * kWidth);
        *total = multiply_add(other[s][u], splat(r.total[(first + s) * r.m + t.row + m]), *total);
      }
    }
  }
}

template <int SOURCE>
struct FloatPath {
  static constexpr int kBytes = kPaired<SOURCE> ? 2 : 4, kPanelColumns = kPaired<SOURCE> ? 2 : 1;
  static constexpr int kRows = kPanelRows;
  static constexpr int64_t kDirectRows = SOURCE == kFloat8Pairs ? kFewRows : kSomeRows;  // which takes long to decode
  static constexpr int kPanelSource = kPaired<SOURCE> ? kPairsPanel : kPanel;

  static Factors factors(const Linear& l, const Rows& r) { return {l.factor, r.form == kFormPairs ? r.scale : nullptr}; }

  static int64_t chunk(const Linear&, const Rows& r) { return r.form == kFormPairs || r.form == kFormFloats ? r.block : kChunk; }

  static const uint32_t* words_of(const Linear& l, int64_t unit) {
    const int64_t block = words_per_block(l, kColumns<SOURCE>);
    return static_cast<const uint32_t*>(l.codes) + unit / kParts * block + unit % kParts * kWidth;
  }

  template <int M>
  static void direct(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t) {
    constexpr int kStrands = M * kDirectUnits <= 2 ? 4 : M * kDirectUnits <= 4 ? 2 : 1;
    Unit units[kDirectUnits];
    for (int u = 0; u < kDirectUnits; ++u) units[u] = {words_of(l, unit_of(t, u)), Scales(l, unit_of(t, u))};
    const Columns x = columns_of<SOURCE>(r, t.row);
    Walk walk(chunks, t.first);
    if ((r.form == kFormPairs ? chunks.padded : l.group) % chunks.length == 0)
      while (walk.chunk + kStrands <= t.last) multiply<SOURCE, M, kDirectUnits, kStrands>(l, r, x, t, walk, units);
    while (walk.chunk < t.last) multiply<SOURCE, M, kDirectUnits, 1>(l, r, x, t, walk, units);
  }

  template <int M>
  static void panel(const Linear& l, const Rows& r, const Chunks& chunks, const Tile& t) {
    Unit units[kPanelUnits];
    for (int u = 0; u < kPanelUnits; ++u) units[u] = {t.words + u * kWidth, Scales(l, unit_of(t, u))};
    Columns x = columns_of<SOURCE>(r, t.row);
    if (x.stride % kAliasFloats == 0) x = gather<M>(l, x, chunks, t);
    for (Walk walk(chunks, t.first); walk.chunk < t.last;) multiply<kPanelSource, M, kPanelUnits, 1>(l, r, x, t, walk, units);
  }

  // Rows at a distance of a multiple of 4096 bytes share one set of the level-1 cache and evict each other; a copy does not.
  template <int M>
  static Columns gather(const Linear& l, const Columns& x, const Chunks& chunks, const Tile& t) {
    const Walk first(chunks, t.first), end(chunks, t.last);
    const int64_t from = first.group * l.group + first.first_column(), stop = end.group * l.group + end.first_column();
    float* copy = reinterpret_cast<float*>(t.spare);
    for (int m = 0; m < M; ++m) memcpy(copy + m * kSpareStride, x.x + m * x.stride + from, static_cast<size_t>(stop - from) * 4);
    return {copy, kSpareStride, from};
  }

  static void unpack(const Linear& l, const Chunks& chunks, const Tile& t, uint32_t* out) {
    const Table* table = l.table ? l.table : &kWhole;
    for (int u = 0; u < kPanelUnits; ++u) {
      const int64_t unit = unit_of(t, u), at = scale_of(l, unit);
      const uint32_t* words = words_of(l, unit) + chunks.stored_column(t.first) / kColumns<SOURCE> * kLanes;
      uint32_t* to = out + u * kWidth;
      for (Walk walk(chunks, t.first); walk.chunk < t.last; walk.next()) {
        Floats offsets[5];
        load_offsets<SOURCE>(l, at + walk.group * kLanes, offsets);
        for (int64_t k = 0; k < walk.columns(); k += kColumns<SOURCE>, words += kLanes) {
          Packed<SOURCE> packed;
          packed.load(words, kBoth<SOURCE> ? words_per_plane(l) : 0);
#pragma GCC unroll 8
          for (int c = 0; c < kSteps<SOURCE>; ++c, to += kPanelWidth)
            *reinterpret_cast<FloatsAnywhere*>(to) = decode(packed, c, offsets, table);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qk

// Attention over paged keys and values, stored in T, int8 or int4: what a warp does with 16 rows of queries and 16 tokens at a time.
//
// - 16 rows of queries are the tall operand of the tensor-core products: queries times 16 keys, then weights times 16 values, with
//   a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867). Rows share a key head; which query heads and tokens they
//   are is the kernel's business: attend.cu (decoded tokens), attend_prompt.cu (neighbouring tokens of one sequence).
// - A product's sum runs over channels in any order, so a lane reads 8 neighbouring channels of a key; and its columns may be any
//   channels, so a lane reads head / 8 neighbouring channels of a value. A lane reads from shared memory what the lane of its
//   number copied there.
// - Quantized keys and values become (code - zero) * scale in float32 (int8) or T (int4, whose scales are of T) right before the
//   products, rounded once to T.
#pragma once
#include "pages.cuh"
#include "unpack.cuh"

namespace qk {

struct Attend {  // AttendStruct of kernels/cuda/attention.py
  const void* q;             // (rows, heads, head) of T
  const void *keys, *values, *key_scales, *value_scales;
  const int32_t* positions;  // (rows): a row sees tokens 0 to its own; a negative one sees nothing and reads zeros
  const int32_t* slots;      // (rows)
  const int32_t* table;      // (slots, stride)
  void* out;                 // (rows, heads, head) of T
  float* partial;            // (rows, kv_heads * packs, splits, 16, head + 2)
  int32_t* arrived;          // (rows, kv_heads * packs) zeros, left as zeros
  const int32_t* tiles;      // (count, 2) of attend_prompt: first row and number of rows, neighbours of one sequence
  int32_t rows, heads, kv_heads, head, stride, splits, window, kv_kind, dtype, count;  // window 0: none
  float scale, softcap;      // softcap 0: none
};

constexpr int kHeadRows = 16, kTokens = 16, kAttendStages = 3, kAttendWarps = 4;

// Bytes of 8 and of D / 8 channels, and of the scales that a lane needs for 16 tokens: two keys and four values.
template <int D, int kKind> struct KvStage {
  static constexpr int key_piece = kKind == kKvFloat ? 16 : kKind == kKvInt8 ? 8 : 4;
  static constexpr int value_piece = key_piece * D / 64;
  static constexpr int key_bytes = D / 32 * 2 * key_piece, value_bytes = 4 * value_piece;  // per lane
  static constexpr int key_scale = kKind == kKvInt4 ? D / 32 * 4 : 4;
  static constexpr int scale_bytes = kKind == kKvFloat ? 0 : 2 * key_scale + 4 * 4;
  static constexpr int size = kWarp * (key_bytes + value_bytes + scale_bytes);
};

template <int kBytes> __device__ inline void copy_piece(void* to, const void* from, bool there) {
  if constexpr (kBytes >= 16)
    for (int i = 0; i < kBytes / 16; ++i) copy16(static_cast<char*>(to) + i * 16, static_cast<const char*>(from) + i * 16, there ? 16 : 0);
  else if constexpr (kBytes == 8) copy8(to, from, there ? 8 : 0);
  else copy4(to, from, there ? 4 : 0);
}

// (code - zero) * scale of the code at bit `shift`: integers become floats by the mantissa, conversions are slow.
template <class T> __device__ inline float open_nibble(uint32_t word, int shift, uint32_t grid) {
  return (__uint_as_float((word >> shift & 15) | 0x4b000000) - __uint_as_float(grid >> 16 | 0x4b000000)) *
         to_float(T{uint16_t(grid)});
}

// Pairs of channels of one key: codes in `words` (8 channels), as four registers of T.
template <class T, int kKind> __device__ inline void open_key(const uint32_t* words, uint32_t grid, uint32_t (&out)[4]) {
  if constexpr (kKind == kKvFloat) {
    for (int i = 0; i < 4; ++i) out[i] = words[i];
  } else if constexpr (kKind == kKvInt8) {
    const float scale = __uint_as_float(grid);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float two[2];
      for (int j = 0; j < 2; ++j)
        two[j] = (__uint_as_float(__byte_perm(words[i / 2], 0x4b000000, 0x7440 + i % 2 * 2 + j)) - (kWholes + 128)) * scale;
      out[i] = pack<T>(two[0], two[1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = pack<T>(open_nibble<T>(words[0], 8 * i, grid), open_nibble<T>(words[0], 8 * i + 4, grid));
  }
}

// Channel j of two values, side by side as a register of T.
template <class T, int kKind>
__device__ inline uint32_t open_values(const uint32_t* first, const uint32_t* second, int j, uint32_t grid, uint32_t other) {
  if constexpr (kKind == kKvFloat) {
    return __byte_perm(first[j / 2], second[j / 2], j % 2 ? 0x7632 : 0x5410);
  } else if constexpr (kKind == kKvInt8) {
    const uint32_t pick = 0x7440 + j % 4;
    return pack<T>((__uint_as_float(__byte_perm(first[j / 4], 0x4b000000, pick)) - (kWholes + 128)) * __uint_as_float(grid),
                   (__uint_as_float(__byte_perm(second[j / 4], 0x4b000000, pick)) - (kWholes + 128)) * __uint_as_float(other));
  } else {
    const int shift = j % 8 * 4;
    return pack<T>(open_nibble<T>(first[j / 8], shift, grid), open_nibble<T>(second[j / 8], shift, other));
  }
}

// `kPlaces`: how many positions a lane's two rows have: 1 or 2.
template <class T, int D, int kKind, int kPlaces> struct Attention {
  using S = KvStage<D, kKind>;
  const Attend& a;
  char* shared;
  const int32_t* pages;  // of the rows' sequence
  const int lane, kv_head, last;  // `last`: token up to which the pages are read
  int position[kPlaces], start[kPlaces];  // rows lane / 4 and lane / 4 + 8 see the tokens from start to position
  uint32_t q[D / 16][4];
  float out[D / 8][4];
  float most[2], total[2];  // of rows lane / 4 and lane / 4 + 8

  // Token `lane's own` number within the 16: of key tile j, or value number i.
  __device__ int key_token(int j) const { return j * 8 + lane / 4; }
  __device__ int value_token(int i) const { return lane % 4 * 2 + i % 2 + i / 2 * 8; }

  // Copy the share of warp number `warp` of `kSharers` of 16 tokens.
  template <int kSharers> __device__ void fetch(int block, int slot, int warp) {
    char* to = shared + slot * S::size;
    const int page = pages[block * kTokens / kPageTokens];
    const int64_t base = (int64_t(page) * a.kv_heads + kv_head) * kPageTokens + block * kTokens % kPageTokens;
    const int left = last + 1 - block * kTokens;  // tokens that are there
    constexpr int kToken = S::key_piece * D / 8;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        if (kSharers > 1 && (j * (D / 32) + b) % kSharers != warp) continue;
        const char* from = static_cast<const char*>(a.keys) + (base + key_token(j)) * kToken + (b * 4 + lane % 4) * S::key_piece;
        copy_piece<S::key_piece>(to + ((j * (D / 32) + b) * kWarp + lane) * S::key_piece, from, key_token(j) < left);
      }
    to += kWarp * S::key_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kSharers > 1 && i % kSharers != warp) continue;
      const char* from = static_cast<const char*>(a.values) + (base + value_token(i)) * kToken + lane / 4 * S::value_piece;
      copy_piece<S::value_piece>(to + (i * kWarp + lane) * S::value_piece, from, value_token(i) < left);
    }
    to += kWarp * S::value_bytes;
    if constexpr (kKind != kKvFloat) {
      constexpr int kGroups = kKind == kKvInt4 ? D / 32 : 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (kSharers > 1 && j % kSharers != warp) continue;
        copy_piece<S::key_scale>(to + (j * kWarp + lane) * S::key_scale,
                                 static_cast<const char*>(a.key_scales) + (base + key_token(j)) * S::key_scale, key_token(j) < left);
      }
      to += kWarp * 2 * S::key_scale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kSharers > 1 && i % kSharers != warp) continue;
        const int group = kKind == kKvInt4 ? lane / 4 * (D / 8) / kKvGroup : 0;
        copy4(to + (i * kWarp + lane) * 4, static_cast<const uint32_t*>(a.value_scales) + (base + value_token(i)) * kGroups + group,
              value_token(i) < left ? 4 : 0);
      }
    }
  }

  // Start with 16 rows: row number r is the one at `row(r)` in q, or zeros where that is negative.
  template <class Row> __device__ void begin(Row row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = kNegativeInfinity, total[r] = 0;
      const int64_t at = row(lane / 4 + 8 * r);
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        alignas(16) uint32_t pairs[4] = {0, 0, 0, 0};
        if (at >= 0)
          *reinterpret_cast<uint4*>(pairs) = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.q) + at * D + b * 32 + lane % 4 * 8);
        q[2 * b][r] = pairs[0], q[2 * b][r + 2] = pairs[1], q[2 * b + 1][r] = pairs[2], q[2 * b + 1][r + 2] = pairs[3];
      }
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      for (int i = 0; i < 4; ++i) out[d][i] = 0;
  }

  __device__ void score(const char* from, float (&scores)[2][4]) {
    const char* grids = from + kWarp * (S::key_bytes + S::value_bytes);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      for (int i = 0; i < 4; ++i) scores[j][i] = 0;
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(from + ((j * (D / 32) + b) * kWarp + lane) * S::key_piece);
        uint32_t grid = 0, pairs[4];
        if constexpr (kKind != kKvFloat)
          grid = reinterpret_cast<const uint32_t*>(grids + (j * kWarp + lane) * S::key_scale)[kKind == kKvInt4 ? b : 0];
        open_key<T, kKind>(words, grid, pairs);
        mma<T>(scores[j], q[2 * b], pairs[0], pairs[1]);
        mma<T>(scores[j], q[2 * b + 1], pairs[2], pairs[3]);
      }
    }
  }

  // Scores to weights: scale, cap, mask, and bring what was summed so far to the new maximum.
  __device__ void weigh(int block, float (&scores)[2][4]) {
    float now[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = block * kTokens + j * 8 + lane % 4 * 2 + i % 2;
        float score = scores[j][i] * a.scale;
        if (a.softcap > 0) score = a.softcap * tanhf(score / a.softcap);
        constexpr int kApart = kPlaces - 1;
        scores[j][i] = token <= position[i / 2 * kApart] && token >= start[i / 2 * kApart] ? score : kNegativeInfinity;
        now[i / 2] = fmaxf(now[i / 2], scores[j][i]);
      }
    for (int r = 0; r < 2; ++r) {
      now[r] = fmaxf(now[r], exchange(now[r], 1));
      now[r] = fmaxf(now[r], exchange(now[r], 2));
    }
    float sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][i] = scores[j][i] <= kNegativeInfinity ? 0.0f : expf(scores[j][i] - now[i / 2]);
        sum[i / 2] += scores[j][i];
      }
    for (int r = 0; r < 2; ++r) {
      const float fade = expf(most[r] - now[r]);
      total[r] = total[r] * fade + sum[r];
      most[r] = now[r];
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[d][2 * r] *= fade, out[d][2 * r + 1] *= fade;
    }
  }

  __device__ void add_values(const char* from, const float (&weights)[2][4]) {
    const uint32_t p[4] = {pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[0][2], weights[0][3]),
                           pack<T>(weights[1][0], weights[1][1]), pack<T>(weights[1][2], weights[1][3])};
    const char* at = from + kWarp * S::key_bytes;
    const char* grids = at + kWarp * (S::value_bytes + (kKind == kKvFloat ? 0 : 2 * S::key_scale));
    const uint32_t* words[4];
    uint32_t grid[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = reinterpret_cast<const uint32_t*>(at + (i * kWarp + lane) * S::value_piece);
      if constexpr (kKind != kKvFloat) grid[i] = *reinterpret_cast<const uint32_t*>(grids + (i * kWarp + lane) * 4);
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      mma<T>(out[d], p, open_values<T, kKind>(words[0], words[1], d, grid[0], grid[1]),
             open_values<T, kKind>(words[2], words[3], d, grid[2], grid[3]));
  }

  // Take in 16 tokens that have been copied to a slot.
  __device__ void read(int block, int slot) {
    const char* from = shared + slot * S::size;
    float scores[2][4];
    score(from, scores);
    weigh(block, scores);
    add_values(from, scores);
  }

  // Bring together what the four lanes of a row have counted.
  __device__ void end() {
    for (int r = 0; r < 2; ++r) {
      total[r] += exchange(total[r], 1);
      total[r] += exchange(total[r], 2);
    }
  }
};

// Call the launch of the Kernel<T, D, kKind> that `a` asks for.
template <template <class, int, int> class Kernel, class T, int D> int pick_kind(const Attend& a, void* stream) {
  return a.kv_kind == kKvFloat  ? Kernel<T, D, kKvFloat>::launch(a, stream)
         : a.kv_kind == kKvInt8 ? Kernel<T, D, kKvInt8>::launch(a, stream)
                                : Kernel<T, D, kKvInt4>::launch(a, stream);
}
template <template <class, int, int> class Kernel, class T> int pick_head(const Attend& a, void* stream) {
  return a.head == 64 ? pick_kind<Kernel, T, 64>(a, stream) : a.head == 128 ? pick_kind<Kernel, T, 128>(a, stream) : 1;
}
template <template <class, int, int> class Kernel> int pick(const Attend& a, void* stream) {
  return a.dtype == kBFloat16 ? pick_head<Kernel, BFloat16>(a, stream) : pick_head<Kernel, Half>(a, stream);
}

}  // namespace qk

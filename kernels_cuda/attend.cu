// Attention of decoded tokens over paged keys and values, stored in T, int8 or int4: read the pages once, at memory's speed.
//
// - The query heads that share a key head (up to 16) are the 16 rows of the tensor-core products: queries times 16 keys, then weights
//   times 16 values. A warp takes 16 tokens at a time and keeps its own running maximum (Milakov and Gimelshein 2018,
//   arXiv:1805.02867); four warps per block take four runs of tokens, and blocks split the sequence (Dao et al. 2023, flash decoding).
// - A product's sum runs over channels in any order, so a lane reads 8 neighbouring channels of a key; and its columns may be any
//   channels, so a lane reads head / 8 neighbouring channels of a value. What a lane copies only that lane reads back.
// - Quantized keys and values become (code - zero) * scale in float32 (int8) or T (int4, whose scales are of T) right before the
//   products, rounded once to T.
// - Parts are merged in their order by the block that arrives last: the same bits every time.
#include "pages.cuh"
#include "unpack.cuh"

namespace qk {

struct Attend {  // AttendStruct of kernels/cuda_attention.py
  const void* q;             // (rows, heads, head) of T
  const void *keys, *values, *key_scales, *value_scales;
  const int32_t* positions;  // (rows): a row sees tokens 0 to its own
  const int32_t* slots;      // (rows)
  const int32_t* table;      // (slots, stride)
  void* out;                 // (rows, heads, head) of T
  float* partial;            // (rows, kv_heads * packs, splits, 16, head + 2)
  int32_t* arrived;          // (rows, kv_heads * packs) zeros, left as zeros
  int32_t rows, heads, kv_heads, head, stride, splits, window, kv_kind, dtype;  // window 0: none
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

template <class T, int D, int kKind> struct Attention {
  using S = KvStage<D, kKind>;
  const Attend& a;
  char* shared;
  const int32_t* pages;  // of the row's sequence
  const int lane, kv_head, position, start;
  uint32_t q[D / 16][4];
  float out[D / 8][4];
  float most[2], total[2];  // of heads lane / 4 and lane / 4 + 8

  // Token `lane's own` number within the 16: of key tile j, or value number i.
  __device__ int key_token(int j) const { return j * 8 + lane / 4; }
  __device__ int value_token(int i) const { return lane % 4 * 2 + i % 2 + i / 2 * 8; }

  __device__ void fetch(int block, int slot) {
    char* to = shared + slot * S::size;
    const int page = pages[block * kTokens / kPageTokens];
    const int64_t base = (int64_t(page) * a.kv_heads + kv_head) * kPageTokens + block * kTokens % kPageTokens;
    const int left = position + 1 - block * kTokens;  // tokens that are there
    constexpr int kToken = S::key_piece * D / 8;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        const char* from = static_cast<const char*>(a.keys) + (base + key_token(j)) * kToken + (b * 4 + lane % 4) * S::key_piece;
        copy_piece<S::key_piece>(to + ((j * (D / 32) + b) * kWarp + lane) * S::key_piece, from, key_token(j) < left);
      }
    to += kWarp * S::key_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* from = static_cast<const char*>(a.values) + (base + value_token(i)) * kToken + lane / 4 * S::value_piece;
      copy_piece<S::value_piece>(to + (i * kWarp + lane) * S::value_piece, from, value_token(i) < left);
    }
    to += kWarp * S::value_bytes;
    if constexpr (kKind != kKvFloat) {
      constexpr int kGroups = kKind == kKvInt4 ? D / 32 : 1;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        copy_piece<S::key_scale>(to + (j * kWarp + lane) * S::key_scale,
                                 static_cast<const char*>(a.key_scales) + (base + key_token(j)) * S::key_scale, key_token(j) < left);
      to += kWarp * 2 * S::key_scale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int group = kKind == kKvInt4 ? lane / 4 * (D / 8) / kKvGroup : 0;
        copy4(to + (i * kWarp + lane) * 4, static_cast<const uint32_t*>(a.value_scales) + (base + value_token(i)) * kGroups + group,
              value_token(i) < left ? 4 : 0);
      }
    }
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
        scores[j][i] = token <= position && token >= start ? score : kNegativeInfinity;
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

  __device__ void run(int begin, int end) {
    for (int s = 0; s < kAttendStages - 1; ++s) {
      if (begin + s < end) fetch(begin + s, s);
      copies_commit();
    }
    for (int block = begin; block < end; ++block) {
      copies_wait<kAttendStages - 2>();
      const int next = block + kAttendStages - 1;
      if (next < end) fetch(next, (next - begin) % kAttendStages);
      copies_commit();
      const char* from = shared + (block - begin) % kAttendStages * S::size;
      float scores[2][4];
      score(from, scores);
      weigh(block, scores);
      add_values(from, scores);
    }
    copies_wait<0>();
    for (int r = 0; r < 2; ++r) {
      total[r] += exchange(total[r], 1);
      total[r] += exchange(total[r], 2);
    }
  }
};

// Add up `count` parts of (16, D + 2) numbers (sums, then maximum and total of a head) in their order: element `d` of `head`.
template <int D> __device__ inline void merge(const float* parts, int count, int head, int d, float& value, float& most, float& total) {
  constexpr int kRow = D + 2;
  most = kNegativeInfinity, value = 0, total = 0;
  for (int i = 0; i < count; ++i) most = fmaxf(most, fresh(parts + (i * kHeadRows + head) * kRow + D));
  for (int i = 0; i < count; ++i) {
    const float* part = parts + (i * kHeadRows + head) * kRow;
    const float fade = expf(fresh(part + D) - most);
    value += fade * fresh(part + d), total += fade * fresh(part + D + 1);
  }
}

template <class T, int D, int kKind> __global__ void __launch_bounds__(kAttendWarps* kWarp) attend(Attend a) {
  using W = Attention<T, D, kKind>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, row = blockIdx.z;
  const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows, kv_head = blockIdx.y / packs;
  const int first = kv_head * shared_by + blockIdx.y % packs * kHeadRows;
  const int heads = min(kHeadRows, (kv_head + 1) * shared_by - first), position = a.positions[row];
  const int start = a.window > 0 ? max(0, position + 1 - a.window) : 0;
  W w{a, static_cast<char*>(shared_memory()) + warp * kAttendStages * W::S::size,
      a.table + int64_t(a.slots[row]) * a.stride, lane, kv_head, position, start};
  for (int r = 0; r < 2; ++r) w.most[r] = kNegativeInfinity, w.total[r] = 0;
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
    for (int i = 0; i < 4; ++i) w.out[d][i] = 0;
#pragma unroll
  for (int b = 0; b < D / 32; ++b)
    for (int r = 0; r < 2; ++r) {
      const int head = lane / 4 + 8 * r;
      alignas(16) uint32_t pairs[4] = {0, 0, 0, 0};
      if (head < heads)
        *reinterpret_cast<uint4*>(pairs) = *reinterpret_cast<const uint4*>(
            static_cast<const T*>(a.q) + (int64_t(row) * a.heads + first + head) * D + b * 32 + lane % 4 * 8);
      w.q[2 * b][r] = pairs[0], w.q[2 * b][r + 2] = pairs[1], w.q[2 * b + 1][r] = pairs[2], w.q[2 * b + 1][r + 2] = pairs[3];
    }
  const int from = start / kTokens, blocks = position / kTokens + 1 - from;
  const int part = blockIdx.x * kAttendWarps + warp, parts = a.splits * kAttendWarps;
  w.run(from + int(int64_t(blocks) * part / parts), from + int(int64_t(blocks) * (part + 1) / parts));

  constexpr int kRow = D + 2;
  __syncthreads();
  float* sums = static_cast<float*>(shared_memory());
  float* own = sums + warp * kHeadRows * kRow;
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
    for (int i = 0; i < 4; ++i)  // column c of product d is channel c * D / 8 + d
      own[(lane / 4 + i / 2 * 8) * kRow + (lane % 4 * 2 + i % 2) * (D / 8) + d] = w.out[d][i];
  if (lane % 4 == 0)
    for (int r = 0; r < 2; ++r) own[(lane / 4 + 8 * r) * kRow + D] = w.most[r], own[(lane / 4 + 8 * r) * kRow + D + 1] = w.total[r];
  __syncthreads();

  const int64_t item = int64_t(row) * gridDim.y + blockIdx.y;
  float* partial = a.partial + item * a.splits * kHeadRows * kRow;
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.heads + first) * D;
  for (int at = threadIdx.x; at < heads * D; at += blockDim.x) {
    float value, most, total;
    merge<D>(sums, kAttendWarps, at / D, at % D, value, most, total);
    if (a.splits == 1) {
      out[at] = from_float<T>(value / total);
      continue;
    }
    float* to = partial + (blockIdx.x * kHeadRows + at / D) * kRow;
    to[at % D] = value;
    if (at % D == 0) to[D] = most, to[D + 1] = total;
  }
  if (a.splits == 1) return;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + item, 1) == a.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int at = threadIdx.x; at < heads * D; at += blockDim.x) {
    float value, most, total;
    merge<D>(partial, a.splits, at / D, at % D, value, most, total);
    out[at] = from_float<T>(value / total);
  }
  if (threadIdx.x == 0) a.arrived[item] = 0;
}

template <class T, int D, int kKind> int launch_attend(const Attend& a, void* stream) {
  const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows;
  constexpr size_t stages = size_t(kAttendWarps) * kAttendStages * KvStage<D, kKind>::size;
  constexpr size_t sums = sizeof(float) * kAttendWarps * kHeadRows * (D + 2);
  const dim3 grid(unsigned(a.splits), unsigned(a.kv_heads * packs), unsigned(a.rows));
  return launch(attend<T, D, kKind>, grid, kAttendWarps * kWarp, stages > sums ? stages : sums, stream, a);
}

template <class T, int D> int launch_attend(const Attend& a, void* stream) {
  return a.kv_kind == kKvFloat  ? launch_attend<T, D, kKvFloat>(a, stream)
         : a.kv_kind == kKvInt8 ? launch_attend<T, D, kKvInt8>(a, stream)
                                : launch_attend<T, D, kKvInt4>(a, stream);
}

template <class T> int launch_attend(const Attend& a, void* stream) {
  return a.head == 64 ? launch_attend<T, 64>(a, stream) : a.head == 128 ? launch_attend<T, 128>(a, stream) : 1;
}

}  // namespace qk

QK_API int qk_attend(const qk::Attend* a, void* stream) {
  if (a->rows == 0) return 0;
  return a->dtype == qk::kBFloat16 ? qk::launch_attend<qk::BFloat16>(*a, stream) : qk::launch_attend<qk::Half>(*a, stream);
}

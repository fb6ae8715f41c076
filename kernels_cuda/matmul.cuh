// y = x @ w.T (+ bias) for few tokens: read the weight once, as fast as memory gives it, and leave everything else in its shadow.
//
// - The weight is the tall operand (16 rows of N), tokens are the 8 columns: up to 8 tokens cost what one does.
// - A block is four warps (two where shared memory is small) over one tile of 64 rows and one range of K, of which each warp takes
//   its share. What a lane copies into shared memory only that lane reads back, so a warp never waits for another before the sums
//   are added up at the end.
// - Four stages of copies (2 KB of 4-bit weights each, and the activations, scales and zero points that go with them) are under way
//   per warp: with the three or four blocks that fit an SM that is over 64 KB in flight.
// - Products are of integers (code - zero_point) and activations; a group's sum is scaled in float32. Nothing else is rounded.
// - K is split over blocks where tiles are fewer than the machine's SMs. The block that arrives last adds the parts in their
//   order: the same bits every time. The split depends on N and K, not on the tokens: neither do a token's sums.
// - More tokens than a block takes are chunks: blockIdx.x, the first to count on, so that blocks that read the same weight start
//   together, and all but one of them find it in the second cache. blockIdx.y is the tile, blockIdx.z the part of K.
// - With `offsets`, blockIdx.z is an expert, and tokens offsets[z] .. offsets[z + 1] are its own, however many chunks they are.
// - With `activation`, rows 2 i and 2 i + 1 are a gate and its value, which the block that has both sums multiplies at once.
#pragma once
#include "activation.cuh"
#include "block.cuh"
#include "unpack.cuh"

namespace qk {

constexpr int kMostWarps = 4, kStages = 4;

struct Matmul {  // MatmulStruct of kernels/cuda/calls.py
  const void* x;           // (tokens, k) of T, or bytes; 16-byte rows
  const uint4* codes;      // (experts, tiles, steps, 64 x 64 codes)
  const uint4* scales;     // 16-bit (experts, tiles, groups, 8 lanes g, 4 parts, 2 rows)
  const uint2* zeros;      // uint8, likewise, or null: zero_code
  const void* bias;        // (n) of the output's type, or null
  const float* x_scales;   // (tokens): what products of 8-bit activations are multiplied by
  const int* offsets;      // (experts + 1), or null
  void* y;                 // (tokens, n), or (tokens, n / 2) with an activation
  float* partial;          // (chunks, tiles, splits, tokens of a block, 64), if splits > 1
  int* arrived;            // (chunks, tiles) zeros, left as zeros
  Best* bests;             // (tokens, tiles): the largest y of a tile's rows, without an activation; or null
  int32_t tokens, n, k, experts;
  int32_t group_shift;     // column >> group_shift is the group; 31 for a scale per channel
  int32_t splits, zero_code, scales_are_bfloat16, dtype;
  int32_t activation;      // of activation.cuh, or kNoActivation; n is even with one
};

enum Kind { kCodes4 = 4, kCodes8 = 8, kInt8 = 9, kFp8 = 10 };

// How a kind multiplies. `Part` sums a group; `bytes` is a token's activations of a lane and half step.
template <class T, int kKind> struct Product {
  using Part = float;
  static constexpr int bits = kKind, activation_bytes = 2;
  static __device__ void step(float (&c)[4], const uint32_t (&a)[4], const uint32_t* x, int s) {
    mma<T>(c, a, x[2 * s], x[2 * s + 1]);
  }
};
template <class T> struct Product<T, kInt8> {
  using Part = int;
  static constexpr int bits = 8, activation_bytes = 1;
  static __device__ void half(int (&c)[4], const uint32_t* w, const uint32_t* x) {  // offset binary to two's complement
    uint32_t a[4] = {w[0] ^ 0x80808080, w[1] ^ 0x80808080, w[2] ^ 0x80808080, w[3] ^ 0x80808080};
    mma_int8(c, a, x[0], x[1]);
  }
};
template <class T> struct Product<T, kFp8> {
  using Part = float;
  static constexpr int bits = 8, activation_bytes = 1;
  static __device__ void half(float (&c)[4], const uint32_t* w, const uint32_t* x) {
    uint32_t a[4] = {w[0], w[1], w[2], w[3]};
    mma_fp8(c, a, x[0], x[1]);
  }
};

// A warp's shared memory, per stage: codes, activations, scales and zero points; lane-major, 16 bytes (8: zeros, bytes of x).
template <int kBits, int kTokens8, int kBytes> struct Stage {
  static constexpr int codes = kParts * (kBits / 4) * kWarp * 16;
  static constexpr int activations = kTokens8 * 2 * kWarp * 8 * kBytes;
  int scale_rows;
  bool zeros;
  __host__ __device__ int size() const { return codes + activations + scale_rows * kWarp * (16 + (zeros ? 8 : 0)); }
};

template <class T, int kKind, int kTokens8> struct Worker {
  using P = Product<T, kKind>;
  using S = Stage<P::bits, kTokens8, P::activation_bytes>;
  static constexpr int kWords = P::bits / 4 * 4;                      // of a lane, part and step
  static constexpr int kXWords = P::activation_bytes * 4;             // of a lane, 8 tokens and step
  const Matmul& m;
  const S stage;
  char* shared;
  const int lane;
  const int count;  // tokens from x on, of which up to 8 kTokens8 are read
  const char* x;
  const uint4 *codes, *scales;
  const uint2* zeros;
  const uint64_t policy;
  float total[kParts][kTokens8][4];
  typename P::Part part[kTokens8][4];

  __device__ void fetch(int step, int slot) {
    char* to = shared + slot * stage.size();
    constexpr int kCopies = kParts * P::bits / 4;
    const uint4* from = codes + int64_t(step) * (kCopies * kWarp) + lane;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) copy16_stream(to + (i * kWarp + lane) * 16, from + i * kWarp, policy);
    to += S::codes;
    constexpr int kPiece = 8 * P::activation_bytes;
    const int column = step * kStep + lane % 4 * 8;
#pragma unroll(kTokens8 == 1 ? 2 : 1)  // not more: addresses made ahead would not fit the registers
    for (int i = 0; i < 2 * kTokens8; ++i) {
      int token = i / 2 * 8 + lane / 4, left = (m.k - column - i % 2 * 32) * P::activation_bytes;
      if (token >= count || left < 0) left = 0;
      const char* at = left ? x + (int64_t(token) * m.k + column + i % 2 * 32) * P::activation_bytes : x;
      if constexpr (kPiece == 16) copy16(to + (i * kWarp + lane) * 16, at, left < 16 ? left : 16);
      else copy8(to + (i * kWarp + lane) * 8, at, left < 8 ? left : 8);
    }
    to += S::activations;
    for (int i = 0; i < stage.scale_rows; ++i) {
      int last = m.k - 1, group = (step * kStep + i * 32 < last ? step * kStep + i * 32 : last) >> m.group_shift;
      copy16(to + (i * kWarp + lane) * 16, scales + group * 8 + lane / 4);
      if (stage.zeros) copy8(to + stage.scale_rows * kWarp * 16 + (i * kWarp + lane) * 8, zeros + group * 8 + lane / 4);
    }
  }

  // total += scale * part for one 16-row part; `pair` holds the scales of rows g and g + 8.
  __device__ void scale_part(int p, uint32_t pair) {
    float low = to_float_16(pair & 0xffff, m.scales_are_bfloat16), high = to_float_16(pair >> 16, m.scales_are_bfloat16);
#pragma unroll
    for (int j = 0; j < kTokens8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[p][j][i] += (i < 2 ? low : high) * float(part[j][i]), part[j][i] = 0;
  }

  __device__ void compute(int slot) {
    const char* from = shared + slot * stage.size();
    alignas(16) uint32_t x[kTokens8][kXWords];
#pragma unroll
    for (int i = 0; i < 2 * kTokens8; ++i) {
      constexpr int kPiece = 8 * P::activation_bytes;
      const char* at = from + S::codes + (i * kWarp + lane) * kPiece;
      uint32_t* to = &x[i / 2][i % 2 * kXWords / 2];
      if constexpr (kPiece == 16) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(at);
      else *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(at);
    }
    const char* grid = from + S::codes + S::activations;
    alignas(16) uint32_t scale[2][4], zero[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = i < stage.scale_rows ? i : 0;
      *reinterpret_cast<uint4*>(scale[i]) = *reinterpret_cast<const uint4*>(grid + (row * kWarp + lane) * 16);
      zero[i][0] = zero[i][1] = m.zero_code * 0x01010101u;
      const char* at = grid + stage.scale_rows * kWarp * 16 + (row * kWarp + lane) * 8;
      if (stage.zeros) *reinterpret_cast<uint2*>(zero[i]) = *reinterpret_cast<const uint2*>(at);
    }
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      alignas(16) uint32_t words[kWords];
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i)
        *reinterpret_cast<uint4*>(words + 4 * i) =
            *reinterpret_cast<const uint4*>(from + ((p * kWords / 4 + i) * kWarp + lane) * 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (P::activation_bytes == 2) {
          uint32_t codes_of_zero = zero[h][p / 2] >> (p % 2 * 16);
          Zeros taken = make_zeros<T, P::bits>(codes_of_zero & 255, codes_of_zero >> 8 & 255);
#pragma unroll
          for (int s = 2 * h; s < 2 * h + 2; ++s) {
            uint32_t a[4];
            unpack<T, P::bits>(words, s, taken, a);
#pragma unroll
            for (int j = 0; j < kTokens8; ++j) P::step(part[j], a, x[j], s);
          }
        } else {
#pragma unroll
          for (int j = 0; j < kTokens8; ++j) P::half(part[j], words + 4 * h, x[j] + 2 * h);
        }
        if (h == 1 || stage.scale_rows == 2) scale_part(p, scale[h][p]);
      }
    }
  }

  __device__ void run(int begin, int end) {
#pragma unroll 1  // once per block: three copies of it would want more registers than the loop that matters
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) fetch(begin + s, s);
      copies_commit();
    }
    for (int step = begin; step < end; ++step) {
      copies_wait<kStages - 2>();
      int next = step + kStages - 1;
      if (next < end) fetch(next, (next - begin) % kStages);
      copies_commit();
      compute((step - begin) % kStages);
    }
    copies_wait<0>();
  }
};

// What the product has for one element, from its sum.
template <class T> __device__ inline T finished(const Matmul& m, int token, int row, float sum) {
  if (m.x_scales) sum *= m.x_scales[token];
  if (m.bias) sum += to_float(static_cast<const T*>(m.bias)[row]);
  return from_float<T>(sum);
}

// Store y for the sums of rows `row` (even) and row + 1. A gate and its value are rounded to T before they meet, as in memory.
// Returns the larger of the two.
template <class T> __device__ inline Best store(const Matmul& m, int token, int row, float2 sums) {
  if (row >= m.n) return no_best();
  T low = finished<T>(m, token, row, sums.x);
  Best best = candidate(to_float(low), row);
  T* y = static_cast<T*>(m.y) + (m.activation == kNoActivation ? int64_t(token) * m.n + row : (int64_t(token) * m.n + row) / 2);
  if (row + 1 < m.n) {
    T high = finished<T>(m, token, row + 1, sums.y);
    best = better(best, candidate(to_float(high), row + 1));
    if (m.activation == kNoActivation) y[1] = high;
    else low = from_float<T>(activated(to_float(low), m.activation) * to_float(high));
  }
  *y = low;
  return best;
}

__device__ inline float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

// What becomes of the sums of a tile for up to kTokens tokens, once its blocks (or their teams of `size` threads, of which this is
// `rank`) have one each: sum_of(token, row) of rows `row` and row + 1. A warp has a token's rows.
template <class T, int kTokens, class Sum>
__device__ void conclude(const Matmul& m, int tile, int split, Sum sum_of, int first, int count, int rank, int size, bool& last) {
  constexpr int kPairs = kTileRows / 2;
  static_assert(kPairs == kWarp);
  const int tiles = (m.n + kTileRows - 1) / kTileRows, pairs = (count < kTokens ? count : kTokens) * kPairs;
  const int64_t place = blockIdx.x * int64_t(tiles) + tile;
  float2* partial = reinterpret_cast<float2*>(m.partial) + place * m.splits * kTokens * kPairs;
  auto finish_pair = [&](int at, float2 sum) {
    const int token = first + at / kPairs;
    Best best = store<T>(m, token, tile * kTileRows + at % kPairs * 2, sum);
    if (!m.bests) return;
    for (int mask = 16; mask; mask /= 2) best = better(best, exchange(best, mask));
    if (at % kWarp == 0) m.bests[int64_t(token) * tiles + tile] = best;
  };
  for (int at = rank; at < pairs; at += size) {
    const float2 sum = sum_of(at / kPairs, at % kPairs * 2);
    if (m.splits > 1) partial[split * kTokens * kPairs + at] = sum;
    else finish_pair(at, sum);
  }
  if (m.splits == 1) return;
  __threadfence();
  __syncthreads();
  if (rank == 0 && pairs > 0) last = atomicAdd(m.arrived + place, 1) == m.splits - 1;
  __syncthreads();
  if (pairs <= 0 || !last) return;
  __threadfence();
  for (int at = rank; at < pairs; at += size) {
    float2 sum = {0, 0};
    for (int s = 0; s < m.splits; ++s) sum = add(sum, fresh(partial + s * kTokens * kPairs + at));
    finish_pair(at, sum);
  }
  if (rank == 0) m.arrived[place] = 0;
}

// Add up the warps' sums (64 rows of up to 8 kTokens8 tokens), then the blocks' that share the tile.
template <class T, int kTokens8>
__device__ void finish(const Matmul& m, const float (&total)[kParts][kTokens8][4], float* sums, int first, int count) {
  constexpr int kTokens = 8 * kTokens8, kPitch = kTileRows + 4;  // rows of the fragments fall on different banks
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int p = 0; p < kParts; ++p)
#pragma unroll
    for (int j = 0; j < kTokens8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * kTokens + j * 8 + lane % 4 * 2 + i % 2) * kPitch + p * 16 + lane / 4 + i / 2 * 8] = total[p][j][i];
  __syncthreads();
  auto sum_of = [&](int token, int row) {
    float2 sum = {0, 0};
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w)
      sum = add(sum, *reinterpret_cast<const float2*>(sums + (w * kTokens + token) * kPitch + row));
    return sum;
  };
  bool& last = *reinterpret_cast<bool*>(sums + kTileRows);  // between two rows: static shared memory would cost a block per SM
  conclude<T, kTokens>(m, blockIdx.y, blockIdx.z, sum_of, first, count, threadIdx.x, blockDim.x, last);
}

// Blocks that share an SM, which bounds the registers of a thread.
template <int kTokens8> constexpr int blocks_per_sm() { return kTokens8 == 1 ? 4 : kTokens8 == 2 ? 3 : 2; }

template <class T, int kKind, int kTokens8>
__global__ void __launch_bounds__(kMostWarps* kWarp, (blocks_per_sm<kTokens8>())) matmul(Matmul m) {
  using W = Worker<T, kKind, kTokens8>;
  constexpr int kTokens = 8 * kTokens8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int steps = (m.k + kStep - 1) / kStep, groups = ((m.k - 1) >> m.group_shift) + 1;
  const int64_t tile = (m.offsets ? blockIdx.z : 0) * int64_t(gridDim.y) + blockIdx.y;
  const int warps = blockDim.x / kWarp, part = (m.offsets ? 0 : blockIdx.z) * warps + warp, parts = m.splits * warps;
  int first = m.offsets ? m.offsets[blockIdx.z] : blockIdx.x * kTokens;
  const int end = m.offsets ? m.offsets[blockIdx.z + 1] : (first + kTokens < m.tokens ? first + kTokens : m.tokens);
  for (; first < end; first += kTokens) {
    typename W::S stage{m.group_shift == 5 ? 2 : 1, m.zeros != nullptr};
    char* shared = static_cast<char*>(shared_memory());
    const bool again = gridDim.x > 1 || end - first > kTokens;  // evict-first lines might be gone before the next chunk reads them
    W w{m, stage, shared + warp * kStages * stage.size(), lane, end - first,
        static_cast<const char*>(m.x) + int64_t(first) * m.k * W::P::activation_bytes,
        m.codes + tile * steps * (kParts * W::P::bits / 4 * kWarp), m.scales + tile * groups * 8,
        m.zeros ? m.zeros + tile * groups * 8 : nullptr, stream_policy(again), {}, {}};
    w.run(steps * part / parts, steps * (part + 1) / parts);
    __syncthreads();  // the stages become room for the sums
    finish<T, kTokens8>(m, w.total, static_cast<float*>(shared_memory()), first, end - first);
    __syncthreads();
  }
}

// Bytes of shared memory per warp: its stages, which become room for its sums.
template <class T, int kKind, int kTokens8> size_t warp_bytes(const Matmul& m) {
  using S = typename Worker<T, kKind, kTokens8>::S;
  const size_t stages = size_t(kStages) * S{m.group_shift == 5 ? 2 : 1, m.zeros != nullptr}.size();
  const size_t sums = sizeof(float) * 8 * kTokens8 * (kTileRows + 4);
  return stages > sums ? stages : sums;
}

template <class T, int kKind, int kTokens8> int launch_matmul(const Matmul& m, void* stream) {
  // Warps share K: their number is that of the largest blocks, so that a token's sums do not depend on how many there are.
  const int warps = kMostWarps * warp_bytes<T, kKind, 4>(m) <= largest_shared_memory() ? kMostWarps : kMostWarps / 2;
  const size_t warp = warp_bytes<T, kKind, kTokens8>(m);
  const int chunks = m.offsets ? 1 : (m.tokens + 8 * kTokens8 - 1) / (8 * kTokens8);
  dim3 grid(unsigned(chunks), unsigned((m.n + kTileRows - 1) / kTileRows), unsigned(m.offsets ? m.experts : m.splits));
  return launch(matmul<T, kKind, kTokens8>, grid, warps * kWarp, warps * warp, stream, m);
}

template <class T, int kKind> int launch_matmul(const Matmul& m, int tokens8, void* stream) {
  return tokens8 == 1   ? launch_matmul<T, kKind, 1>(m, stream)
         : tokens8 == 2 ? launch_matmul<T, kKind, 2>(m, stream)
         : tokens8 == 4 ? launch_matmul<T, kKind, 4>(m, stream)
                        : 1;
}

template <int kKind> int launch_matmul(const Matmul& m, int tokens8, void* stream) {
  if (m.tokens == 0) return 0;
  if ((m.offsets && m.splits != 1) || (m.activation != kNoActivation && m.n % 2)) return 1;
  return m.dtype == kBFloat16 ? launch_matmul<BFloat16, kKind>(m, tokens8, stream) : launch_matmul<Half, kKind>(m, tokens8, stream);
}

}  // namespace qk

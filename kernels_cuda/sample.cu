// The next token of every row: the most likely one, or a draw from what temperature, top-k, top-p and min-p leave, a block per row.
//
// - Logits have 16 bits, so thresholds are found exactly, four bits in a look at the row: the largest one that still keeps k tokens
//   (top-k), or under which so little probability lies that it may go (top-p). Of equals at the edge of top-p, lower ids go first,
//   as in a stable ascending sort: how many is a division, and from which id on they stay is found the same way.
// - A look sums up what tokens of each of 16 digits are worth. Each thread has its own 16 cells in shared memory, added up in an
//   order that depends on the number of threads alone. (In registers a token would cost 16 comparisons.)
// - The draw is a race: token i wins with probability p_i if log p_i - log e_i is the largest, e_i exponential noise.
// - The noise is a function of seed, position and token alone (Philox-4x32-10: Salmon, Moraes, Dror, Shaw 2011, "Parallel random
//   numbers: as easy as 1, 2, 3"), so neither the batch nor how often a position is tried changes a draw.
// - All settings lie in device memory: a recorded step draws by whatever stands there when it is played.
#include "block.cuh"

namespace qk {

struct Sample {  // SampleStruct of kernels/cuda/sampling.py
  const void* logits;        // (rows, n) of T
  const float* temperature;  // (rows); 0 takes the most likely token, whatever the other settings are
  const int32_t* top_k;      // (rows), at least 1; n and more keep all
  const float* rest;         // (rows): 1 - top_p; 0 keeps all
  const float* min_p;        // (rows)
  const int64_t* seed;       // (rows)
  const int32_t* position;   // (rows): where in its sequence the row stands; below 0 nowhere
  const Best* bests;         // (rows, tiles): the largest logits of `tiles` parts of a row, or null
  const int32_t* slot;       // (rows), or null
  int32_t* chosen;           // (rows); -1 where the largest logit is not a finite number
  int32_t* newest;           // at `slot`, unless that is null: what the last of its rows has chosen, which are neighbours; at least 0
  int32_t rows, n, dtype, tiles;
};

constexpr int kDigits = 16;

// Where a logit, which is not NaN, stands among all of T in order, 0 to 65535; equal ones stand at the same place.
template <class T> __device__ inline uint32_t place_of(T x) {
  const uint32_t bits = to_float(x) == 0 ? 0 : x.bits;
  return bits & 0x8000 ? bits ^ 0xffff : bits | 0x8000;
}
// The number at a place, whether a number has it or not: infinity at the ends.
template <class T> __device__ inline float number_at(uint32_t place) {
  const float value = to_float(T{uint16_t(place & 0x8000 ? place & 0x7fff : ~place)});
  return value == value ? value : place & 0x8000 ? INFINITY : -INFINITY;
}

__device__ inline void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ key0, c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ key1, c[3] = uint32_t(a);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

// -log(e) for exponential noise e. Small e win, and near 0 there are many of them: 32 bits count from there.
__device__ inline float gumbel(uint32_t random) {
  return -logf(-log1pf(-fminf((float(random) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f)));
}

template <class T> struct Row {
  const uint16_t* logits;
  const int n;
  const float inverse;  // of the temperature
  float most;           // the largest logit

  __device__ float score(float x) const { return (x - most) * inverse; }  // log of a probability, but for a constant

  // f(token, logit) for this thread's tokens before `end`, eight neighbours in turn; from `first` on, or up to seven before it.
  template <class F> __device__ void each(int first, int end, F f) const {
    first = first / 8 * 8 + 8 * threadIdx.x;
    if (n % 8 == 0) {
#pragma unroll 2
      for (; first < end; first += 8 * blockDim.x) {
        const uint4 eight = *reinterpret_cast<const uint4*>(logits + first);
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) f(first + i, T{uint16_t(words[i / 2] >> (i % 2 * 16))});
      }
    } else {
      for (; first < end; first += 8 * blockDim.x)
        for (int i = first; i < first + 8 && i < n; ++i) f(i, T{logits[i]});
    }
  }

  // One look: what all add(digit, worth) that f(token, logit, add) calls come to, by digit, until the next look. No digit, no sum.
  template <class V, class F> __device__ const V* sums(int first, int end, F f) const {
    V *cells = static_cast<V*>(shared_memory()), *totals = cells + kDigits * blockDim.x, *mine = cells + threadIdx.x;
    for (int digit = 0; digit < kDigits; ++digit) mine[digit * blockDim.x] = 0;
    each(first, end, [&](int i, T x) {
      f(i, x, [&](uint32_t digit, V worth) { if (digit < kDigits) mine[digit * blockDim.x] += worth; });
    });
    __syncthreads();
    for (int digit = threadIdx.x / kWarp; digit < kDigits; digit += blockDim.x / kWarp) {
      V sum = 0;
      for (int i = threadIdx.x % kWarp; i < int(blockDim.x); i += kWarp) sum += cells[digit * blockDim.x + i];
      for (int mask = 16; mask; mask /= 2) sum += exchange(sum, mask);
      if (threadIdx.x % kWarp == 0) totals[digit] = sum;
    }
    __syncthreads();
    return totals;
  }
};

// The place of the k-th largest logit.
template <class T> __device__ uint32_t place_of_largest(const Row<T>& row, int k) {
  uint32_t found = 0;
  for (int shift = 12, above = 0; shift >= 0; shift -= 4) {
    const int* counts = row.template sums<int>(0, row.n, [=](int, T x, auto add) {
      const uint32_t place = place_of(x);
      if ((place ^ found) >> shift < kDigits) add(place >> shift & 15, 1);
    });
    int digit = kDigits - 1;
    for (; digit > 0 && above + counts[digit] < k; --digit) above += counts[digit];
    found |= uint32_t(digit) << shift;
  }
  return found;
}

// Which of the tokens at a place is the first to stay, when there is `room` under the edge for so many of them; one stays always.
template <class T> __device__ int token_after(const Row<T>& row, uint32_t place, float room) {
  int first = 0, shift = 0, go = 0;
  while (kDigits << shift < row.n) ++shift;
  for (const int widest = shift;; shift = shift > 4 ? shift - 4 : 0) {
    const int end = first + (kDigits << shift);
    const int* counts = row.template sums<int>(first, end < row.n ? end : row.n, [=](int i, T x, auto add) {
      if (place_of(x) == place) add(uint32_t(i - first) >> shift, 1);
    });
    if (shift == widest) {
      int equals = 0;
      for (int digit = 0; digit < kDigits; ++digit) equals += counts[digit];
      go = room < float(equals - 1) ? int(room) : equals - 1;
      if (go <= 0) return 0;
    }
    int digit = 0;
    for (; digit < kDigits - 1 && counts[digit] <= go; ++digit) go -= counts[digit];
    first += digit << shift;
    if (shift == 0) return first;
  }
}

// What top-k and top-p keep: logits above `value`, and of its equals the tokens from `token` on.
struct Edge { float value; int token; };

template <class T> __device__ Edge edge_of(const Row<T>& row, int top_k, float rest) {
  const uint32_t low = top_k < row.n ? place_of_largest(row, top_k) : 0;
  if (rest <= 0) return {number_at<T>(low), 0};
  const uint32_t most = place_of(from_float<T>(row.most));
  uint32_t edge = 0;
  float below = 0, bound = 0;  // probabilities, but for a factor: under the edge, and how much may lie there
  for (int shift = 12; shift >= 0; shift -= 4) {
    const float* masses = row.template sums<float>(0, row.n, [=, &row](int, T x, auto add) {
      const uint32_t place = place_of(x);
      if (place >= low && (place ^ edge) >> shift < kDigits) add(place >> shift & 15, expf(row.score(to_float(x))));
    });
    if (shift == 12) {
      for (int digit = 0; digit < kDigits; ++digit) bound += masses[digit];
      bound *= rest;
    }
    uint32_t digit = 0;
    for (; digit < kDigits - 1 && (edge | (digit + 1) << shift) <= most && below + masses[digit] <= bound; ++digit)
      below += masses[digit];
    edge |= digit << shift;
  }
  const float value = number_at<T>(edge), room = (bound - below) / expf(row.score(value));
  return {value, room >= 1 ? token_after(row, edge, room) : 0};
}

__device__ inline void tell(const Sample& a, int token) {
  if (threadIdx.x) return;
  const int at = blockIdx.x;
  a.chosen[at] = token;
  if (!a.slot || a.position[at] < 0) return;
  const bool last = at + 1 == a.rows || a.slot[at + 1] != a.slot[at] || a.position[at + 1] < 0;
  if (last) a.newest[a.slot[at]] = token < 0 ? 0 : token;
}

template <class T> __global__ void __launch_bounds__(1024, 1) sample(Sample a) {
  __shared__ Best bests[32];
  const int at = blockIdx.x;
  const float temperature = a.temperature[at];
  Row<T> row{static_cast<const uint16_t*>(a.logits) + at * int64_t(a.n), a.n, 1.0f / temperature, 0};
  Best best = no_best();
  if (a.bests) {
    for (int i = threadIdx.x; i < a.tiles; i += blockDim.x) best = better(best, a.bests[at * int64_t(a.tiles) + i]);
  } else {
    row.each(0, a.n, [&](int i, T x) { best = better(best, candidate(to_float(x), i)); });
  }
  const Best likely = block_reduce(best, no_best(), bests, better);
  const bool finite = likely.value > -INFINITY && likely.value < INFINITY;
  if (temperature == 0 || !finite) return tell(a, finite ? likely.index : -1);
  row.most = likely.value;
  const Edge edge = edge_of(row, a.top_k[at], a.rest[at]);
  const float min_p = a.min_p[at];
  const uint64_t seed = uint64_t(a.seed[at]);
  uint32_t noise[4];
  int drawn = -1;  // the four tokens whose noise that is
  best = no_best();
  row.each(0, a.n, [&](int i, T logit) {
    const float x = to_float(logit);
    if (!(x > edge.value || (x == edge.value && i >= edge.token))) return;
    const float score = row.score(x);
    if (min_p > 0 && x < row.most && expf(score) < min_p) return;
    if (drawn != i / 4) {
      drawn = i / 4;
      noise[0] = uint32_t(drawn), noise[1] = uint32_t(a.position[at]), noise[2] = noise[3] = 0;
      philox(noise, uint32_t(seed), uint32_t(seed >> 32));
    }
    const uint32_t word = i % 4 == 0 ? noise[0] : i % 4 == 1 ? noise[1] : i % 4 == 2 ? noise[2] : noise[3];
    best = better(best, {score + gumbel(word), i});
  });
  best = block_reduce(best, no_best(), bests, better);
  tell(a, best.index < a.n ? best.index : likely.index);
}

}  // namespace qk

QK_API int qk_sample(const qk::Sample* a, void* stream) {
  if (a->rows == 0) return 0;
  const dim3 grid{unsigned(a->rows)};
  const int threads = a->n >= 4096 ? 1024 : 256;
  const size_t cells = 4 * qk::kDigits * size_t(threads + 1);
  return a->dtype == qk::kBFloat16 ? qk::launch(qk::sample<qk::BFloat16>, grid, threads, cells, stream, *a)
                                   : qk::launch(qk::sample<qk::Half>, grid, threads, cells, stream, *a);
}

// The next token of every row: the most likely one, or a draw from what temperature, top-k, top-p and min-p leave, a block per row.
//
// - Logits have 16 bits, so thresholds are found exactly, in 16 looks at the row: bit by bit, the largest threshold that still
//   keeps k tokens (top-k), or under which so little probability lies that it may go (top-p). Of equals at the edge of top-p,
//   lower ids go first, as in a stable ascending sort; how many is a division, and from which id on they stay a search more.
// - The draw is a race: token i wins with probability p_i if log p_i - log e_i is the largest, e_i exponential noise.
// - The noise is a function of seed, position and token alone (Philox-4x32-10: Salmon, Moraes, Dror, Shaw 2011, "Parallel random
//   numbers: as easy as 1, 2, 3"), so neither the batch nor how often a position is tried changes a draw.
// - All settings lie in device memory: a recorded step draws by whatever stands there when it is played.
#include "block.cuh"

namespace qk {

struct Sample {  // SampleStruct of kernels/cuda_sampling.py
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
  int32_t* newest;           // at `slot`, unless that is null: the token that a row that stands somewhere has chosen, at least 0
  int32_t rows, n, dtype, tiles;
};

// The number at a place, 0 to 65535, among all of T in order. Beyond infinity it is NaN, which no number is compared to.
template <class T> __device__ inline float number_at(uint32_t place) {
  float value = to_float(T{uint16_t(place & 0x8000 ? place & 0x7fff : ~place)});
  return value != value && !(place & 0x8000) ? -INFINITY : value;
}

// The largest x of so many bits that `holds`; it holds for 0, and for everything below what it holds for. It is asked about
// ever larger x, except where it has just said no.
template <class Holds> __device__ inline uint32_t largest(int bits, Holds holds) {
  uint32_t found = 0;
  for (uint32_t bit = 1u << (bits - 1); bit; bit /= 2)
    if (holds(found | bit)) found |= bit;
  return found;
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
__device__ inline float gumbel(uint32_t random) { return -logf(-log1pf(-(float(random) + 0.5f) * 0x1p-32f)); }

template <class T> struct Row {
  const uint16_t* logits;
  const int n;
  const float inverse;  // of the temperature
  float* sums;          // shared memory: a value per warp
  int* counts;
  float most;           // the largest logit

  // f(token, logit) for this thread's tokens: eight neighbours in turn.
  template <class F> __device__ void each(F f) const {
    if (n % 8 == 0) {
#pragma unroll 2
      for (int first = 8 * threadIdx.x; first < n; first += 8 * blockDim.x) {
        const uint4 eight = *reinterpret_cast<const uint4*>(logits + first);
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) f(first + i, to_float(T{uint16_t(words[i / 2] >> (i % 2 * 16))}));
      }
    } else {
      for (int first = 8 * threadIdx.x; first < n; first += 8 * blockDim.x)
        for (int i = first; i < first + 8 && i < n; ++i) f(i, to_float(T{logits[i]}));
    }
  }
  template <class If> __device__ int count(If counted) const {
    int mine = 0;
    each([&](int i, float x) { mine += counted(i, x); });
    return block_sum(mine, counts);
  }
  __device__ float score(float x) const { return (x - most) * inverse; }  // log of a probability, but for a constant
  // Sum of the probabilities, but for a factor, of logits from `low` to before `end`.
  __device__ float mass(float low, float end) const {
    float mine = 0;
    each([&](int, float x) { if (x >= low && x < end) mine += expf(score(x)); });
    return block_sum(mine, sums);
  }
};

// What top-k and top-p keep: logits above `value`, and of its equals the tokens from `token` on.
struct Edge { float value; int token; };

template <class T> __device__ Edge edge_of(const Row<T>& row, int top_k, float rest) {
  float low = -INFINITY;
  if (top_k < row.n)
    low = number_at<T>(largest(16, [&](uint32_t place) {
      const float end = number_at<T>(place);
      return row.count([=](int, float x) { return x >= end; }) >= top_k;
    }));
  if (rest <= 0) return {low, 0};
  const float bound = rest * row.mass(low, INFINITY);
  float below = 0, edge = low;  // what lies under the edge has been summed up, and is not again
  largest(16, [&](uint32_t place) {
    const float end = number_at<T>(place);
    if (!(end <= row.most)) return false;
    const float more = row.mass(edge, end);
    if (below + more > bound) return false;
    below += more, edge = fmaxf(edge, end);
    return true;
  });
  const int equals = row.count([=](int, float x) { return x == edge; });
  const float room = (bound - below) / expf(row.score(edge));
  const int go = room < float(equals - 1) ? int(room) : equals - 1;
  if (go <= 0) return {edge, 0};
  const uint32_t token = largest(31, [&](uint32_t end) {
    return end <= uint32_t(row.n) && row.count([=](int i, float x) { return x == edge && i < int(end); }) <= go;
  });
  return {edge, int(token)};
}

__device__ inline void tell(const Sample& a, int token) {
  if (threadIdx.x) return;
  a.chosen[blockIdx.x] = token;
  if (a.slot && a.position[blockIdx.x] >= 0) a.newest[a.slot[blockIdx.x]] = token < 0 ? 0 : token;
}

template <class T> __global__ void __launch_bounds__(1024, 1) sample(Sample a) {
  __shared__ Best bests[32];
  __shared__ float sums[32];
  __shared__ int counts[32];
  const int at = blockIdx.x;
  const float temperature = a.temperature[at];
  Row<T> row{static_cast<const uint16_t*>(a.logits) + at * int64_t(a.n), a.n, 1.0f / temperature, sums, counts, 0};
  Best best = no_best();
  if (a.bests) {
    for (int i = threadIdx.x; i < a.tiles; i += blockDim.x) best = better(best, a.bests[at * int64_t(a.tiles) + i]);
  } else {
    row.each([&](int i, float x) { best = better(best, candidate(x, i)); });
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
  row.each([&](int i, float x) {
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
  return a->dtype == qk::kBFloat16 ? qk::launch(qk::sample<qk::BFloat16>, grid, threads, 0, stream, *a)
                                   : qk::launch(qk::sample<qk::Half>, grid, threads, 0, stream, *a);
}

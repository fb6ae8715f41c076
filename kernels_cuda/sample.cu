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
  const int32_t* position;   // (rows): where in its sequence the row stands
  int32_t* chosen;           // (rows)
  int32_t rows, n, dtype;
};

template <class T> struct Infinity;
template <> struct Infinity<Half> { static constexpr uint32_t bits = 0x7c00; };
template <> struct Infinity<BFloat16> { static constexpr uint32_t bits = 0x7f80; };

// A number's place among all of its type, 0 to 65535: equal for equals, NaN below everything.
template <class T> __device__ inline uint32_t key_of(uint32_t bits) {
  if ((bits & 0x7fff) > Infinity<T>::bits) return 0;
  if (bits == 0x8000) bits = 0;
  return bits & 0x8000 ? ~bits & 0xffff : bits | 0x8000;
}
template <class T> __device__ inline float value_of(uint32_t key) {
  return to_float(T{uint16_t(key & 0x8000 ? key & 0x7fff : ~key)});
}

// The largest x from 0 to `most` that `holds`; it holds for 0, and for everything below what it holds for.
template <class Holds> __device__ inline uint32_t largest(uint32_t most, int bits, Holds holds) {
  uint32_t found = 0;
  for (uint32_t bit = 1u << (bits - 1); bit; bit /= 2)
    if ((found | bit) <= most && holds(found | bit)) found |= bit;
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
  const float temperature;
  float* sums;   // shared memory: a value per warp
  int* counts;
  float top;     // the largest logit over the temperature

  __device__ float value(uint32_t key) const { return value_of<T>(key) / temperature; }
  __device__ float weight(uint32_t key) const { return expf(value(key) - top); }

  // f(token, key) for this thread's tokens: four neighbours in turn.
  template <class F> __device__ void each(F f) const {
    for (int first = 4 * threadIdx.x; first < n; first += 4 * blockDim.x) {
      if (n % 4 == 0) {
        const uint2 four = *reinterpret_cast<const uint2*>(logits + first);
        f(first, key_of<T>(four.x & 0xffff)), f(first + 1, key_of<T>(four.x >> 16));
        f(first + 2, key_of<T>(four.y & 0xffff)), f(first + 3, key_of<T>(four.y >> 16));
      } else {
        for (int i = first; i < first + 4 && i < n; ++i) f(i, key_of<T>(logits[i]));
      }
    }
  }
  template <class If> __device__ int count(If counted) const {
    int mine = 0;
    each([&](int i, uint32_t key) { mine += counted(i, key); });
    return block_sum(mine, counts);
  }
  // Sum of the weights of keys from `low` to before `end`: never less for a larger end, since rounding is monotone.
  __device__ float mass(uint32_t low, uint32_t end) const {
    float mine = 0;
    each([&](int, uint32_t key) { if (key >= low && key < end) mine += weight(key); });
    return block_sum(mine, sums);
  }
};

// What top-k and top-p keep: keys above `key`, and of equals the tokens from `token` on.
struct Edge { uint32_t key; int token; };

template <class T> __device__ Edge edge_of(const Row<T>& row, uint32_t most, int top_k, float rest) {
  uint32_t low = 0;
  if (top_k < row.n)
    low = largest(0xffff, 16, [&](uint32_t end) { return row.count([=](int, uint32_t key) { return key >= end; }) >= top_k; });
  if (low == 0) low = 1;  // no NaN
  if (rest <= 0) return {low, 0};
  const float bound = rest * row.mass(low, 0x10000);
  const uint32_t edge = largest(most, 16, [&](uint32_t end) { return row.mass(low, end) <= bound; });
  const int equals = row.count([=](int, uint32_t key) { return key == edge; });
  const float room = (bound - row.mass(low, edge)) / row.weight(edge);
  const int go = room < float(equals - 1) ? int(room) : equals - 1;
  if (go <= 0) return {edge, 0};
  const uint32_t token = largest(uint32_t(row.n), 31, [&](uint32_t end) {
    return row.count([=](int i, uint32_t key) { return key == edge && i < int(end); }) <= go;
  });
  return {edge, int(token)};
}

template <class T> __global__ void __launch_bounds__(1024) sample(Sample a) {
  __shared__ Best bests[32];
  __shared__ float sums[32];
  __shared__ int counts[32];
  const int at = blockIdx.x;
  Row<T> row{static_cast<const uint16_t*>(a.logits) + at * int64_t(a.n), a.n, a.temperature[at], sums, counts, 0};
  Best best = no_best();
  row.each([&](int i, uint32_t key) { best = better(best, {value_of<T>(key), i}); });
  best = block_reduce(best, no_best(), bests, better);
  const int likely = best.index < a.n ? best.index : 0;
  if (row.temperature == 0 || best.index >= a.n) {
    if (threadIdx.x == 0) a.chosen[at] = likely;
    return;
  }
  const uint32_t most = key_of<T>(row.logits[likely]);
  row.top = row.value(most);
  const Edge edge = edge_of(row, most, a.top_k[at], a.rest[at]);
  const float min_p = a.min_p[at];
  const uint64_t seed = uint64_t(a.seed[at]);
  uint32_t noise[4];
  int drawn = -1;  // the four tokens whose noise that is
  best = no_best();
  row.each([&](int i, uint32_t key) {
    if (key < edge.key || (key == edge.key && i < edge.token) || (min_p > 0 && key < most && row.weight(key) < min_p)) return;
    if (drawn != i / 4) {
      drawn = i / 4;
      noise[0] = uint32_t(drawn), noise[1] = uint32_t(a.position[at]), noise[2] = noise[3] = 0;
      philox(noise, uint32_t(seed), uint32_t(seed >> 32));
    }
    const uint32_t word = i % 4 == 0 ? noise[0] : i % 4 == 1 ? noise[1] : i % 4 == 2 ? noise[2] : noise[3];
    best = better(best, {row.value(key) + gumbel(word), i});
  });
  best = block_reduce(best, no_best(), bests, better);
  if (threadIdx.x == 0) a.chosen[at] = best.index < a.n ? best.index : likely;
}

}  // namespace qk

QK_API int qk_sample(const qk::Sample* a, void* stream) {
  if (a->rows == 0) return 0;
  const dim3 grid{unsigned(a->rows)};
  const int threads = a->n >= 4096 ? 1024 : 256;
  return a->dtype == qk::kBFloat16 ? qk::launch(qk::sample<qk::BFloat16>, grid, threads, 0, stream, *a)
                                   : qk::launch(qk::sample<qk::Half>, grid, threads, 0, stream, *a);
}

// Sample the next token of each row of logits, with temperature, top-k, top-p and min-p.
//
// quantkit/kernels/functions/sampling.py defines the result in plain torch by sorting the vocabulary. Here no row is sorted:
// - top-k: the k-th largest of the maxima of every 64 tokens is a lower bound, and few logits reach it.
// - top-p: probabilities are summed in intervals of the distance to the largest logit; only the interval with the threshold is
//   sorted.
// - the draw: token i wins if log p_i plus Gumbel noise is the largest. The noise is a function of seed, position and token
//   (Philox-4x32-10: Salmon, Moraes, Dror, Shaw 2011), so it is computed for the remaining tokens only.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "elementary.h"
#include "parallel.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

namespace qk {
namespace {

constexpr int64_t kBlock = 64;                    // tokens per maximum, and per computation of noise
constexpr int kIntervals = 1024;                  // of the distance to the largest logit, for top-p; the last one is unbounded
constexpr float kIntervalsPerUnit = 32;

struct Draw {
  const void* logits;        // (rows, n)
  const float* temperature;  // (rows); 0 takes the most likely token
  const int32_t* top_k;      // (rows), at least 1
  const float* rest;         // (rows): 1 - top_p; 0 keeps all
  const float* min_p;        // (rows)
  const int64_t* seed;       // (rows)
  const int32_t* position;   // (rows)
  int32_t* chosen;           // (rows); -1 where the largest logit is not a finite number
  float* scratch;            // (rows, scratch_floats(n))
  int64_t n;
  int32_t dtype;
};

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
int64_t scratch_floats(int64_t n) { return blocks_of(n) * (2 * kBlock + 2); }

// The state of one row. Tokens that were filtered out, and the padding of the last block, have the score -inf.
class Row {
 public:
  Row(float* scratch, int64_t n) : blocks_(blocks_of(n)), scores_(scratch), maxima_(scratch + blocks_ * kBlock) {
    bounds_ = maxima_ + blocks_;
    candidates_ = reinterpret_cast<int32_t*>(bounds_ + blocks_);
  }

  // Read the logits and divide them by the temperature; return false if the largest one is not finite.
  bool read(const void* logits, int64_t first, int64_t n, int32_t dtype, float temperature) {
    Ints usable = splat_int(-1);
    top_ = -INFINITY;
    for (int64_t block = 0; block < blocks_; ++block) {
      Floats largest = splat(-INFINITY);
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kWidth) {
        Floats x = splat(-INFINITY);
        if (i + kWidth <= n) x = load_floats(logits, first + i, dtype);
        else for (int lane = 0; i + lane < n; ++lane) x[lane] = load_one(logits, first + i + lane, dtype);
        x = x / temperature;
        usable &= (Ints)(x < INFINITY);  // false for NaN
        largest = x > largest ? x : largest;
        store(scores_ + i, x);
      }
      maxima_[block] = across(largest);
      top_ = std::max(top_, maxima_[block]);
    }
    int32_t all = -1;
    for (int lane = 0; lane < kWidth; ++lane) all &= usable[lane];
    return all && top_ > -INFINITY;
  }

  // The first token with the largest score.
  int32_t likeliest() const {
    const int64_t block = std::find(maxima_, maxima_ + blocks_, top_) - maxima_;
    return static_cast<int32_t>(std::find(scores_ + block * kBlock, scores_ + (block + 1) * kBlock, top_) - scores_);
  }

  // Tokens that equal the k-th largest are kept.
  void keep_top_k(int64_t k) {
    float bound = -INFINITY;
    if (k <= blocks_) {
      std::copy(maxima_, maxima_ + blocks_, bounds_);
      std::nth_element(bounds_, bounds_ + k - 1, bounds_ + blocks_, std::greater<float>());
      bound = bounds_[k - 1];
    }
    float* reach = reinterpret_cast<float*>(candidates_);
    int64_t count = 0;
    each_left(bound, [&](int64_t i) { reach[count++] = scores_[i]; });
    k = std::min(k, count);  // there may be fewer logits that are not -inf
    std::nth_element(reach, reach + k - 1, reach + count, std::greater<float>());
    drop([threshold = reach[k - 1]](Floats x) { return x < threshold; });
  }

  // Drop the least likely tokens whose total probability is at most `rest`, but never the most likely token.
  void keep_top_p(float rest) {
    double mass[kIntervals] = {};
    for (int64_t block = 0; block < blocks_; ++block) {
      if (maxima_[block] == -INFINITY) continue;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kWidth) {
        const Floats x = load(scores_ + i), weight = exp_floats(x - top_);
        const Ints where = interval(x);
        for (int lane = 0; lane < kWidth; ++lane)
          if (x[lane] > -INFINITY) mass[where[lane]] += weight[lane];
      }
    }
    const double bound = rest * std::accumulate(mass, mass + kIntervals, 0.0);
    int edge = kIntervals - 1;
    double below = 0;
    while (edge && below + mass[edge] <= bound) below += mass[edge--];
    drop([this, edge](Floats x) { return interval(x) > edge; });
    int64_t count = 0;
    each_left(-INFINITY, [&](int64_t i) { if (interval(splat(scores_[i]))[0] == edge) candidates_[count++] = int32_t(i); });
    std::sort(candidates_, candidates_ + count, [this](int32_t a, int32_t b) {
      return scores_[a] < scores_[b] || (scores_[a] == scores_[b] && a < b);
    });
    for (int64_t at = 0; at < count - (edge == 0); ++at) {
      below += exp_floats(splat(scores_[candidates_[at]] - top_))[0];
      if (below > bound) break;
      scores_[candidates_[at]] = -INFINITY;
    }
  }

  void keep_min_p(float min_p) {
    drop([this, min_p](Floats x) { return (Ints)(exp_floats(x - top_) < min_p) & (Ints)(x < top_); });
  }

  // The first token with the largest sum of score and noise.
  int32_t race(uint64_t seed, uint32_t position) const {
    float best = -INFINITY;
    int32_t winner = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      Floats largest = splat(-INFINITY);
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kWidth) {
        const Floats x = load(scores_ + i);
        largest = x > largest ? x : largest;
      }
      if (across(largest) == -INFINITY) continue;
      alignas(64) float noise[kBlock];
      make_noise(noise, static_cast<uint32_t>(block * (kBlock / 4)), seed, position);
      largest = splat(-INFINITY);
      for (int64_t i = 0; i < kBlock; i += kWidth) {
        const Floats x = load(scores_ + block * kBlock + i) + load(noise + i);
        largest = x > largest ? x : largest;
        store(noise + i, x);
      }
      const float most = across(largest);
      if (!(most > best)) continue;
      best = most;
      winner = static_cast<int32_t>(block * kBlock + (std::find(noise, noise + kBlock, most) - noise));
    }
    return winner;
  }

 private:
  static float across(Floats x) {
    float most = x[0];
    for (int lane = 1; lane < kWidth; ++lane) most = std::max(most, x[lane]);
    return most;
  }

  Ints interval(Floats x) const {  // of the distance to the largest score
    Floats at = (top_ - x) * kIntervalsPerUnit;
    at = at < float(kIntervals - 1) ? at : splat(kIntervals - 1);
    return __builtin_convertvector(at, Ints);
  }

  // Call f(i) for the remaining tokens whose score reaches a bound.
  template <class F> void each_left(float bound, F f) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      if (!(maxima_[block] >= bound) || maxima_[block] == -INFINITY) continue;
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; ++i)
        if (scores_[i] >= bound && scores_[i] > -INFINITY) f(i);
    }
  }

  template <class F> void drop(F goes) {
    for (int64_t block = 0; block < blocks_; ++block) {
      if (maxima_[block] == -INFINITY) continue;
      Floats largest = splat(-INFINITY);
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kWidth) {
        Floats x = load(scores_ + i);
        x = goes(x) ? splat(-INFINITY) : x;
        largest = x > largest ? x : largest;
        store(scores_ + i, x);
      }
      maxima_[block] = across(largest);
    }
  }

  typedef uint64_t Pairs __attribute__((vector_size(kWidth * 4)));

  // Products of every second word, 64 bits each.
  static Pairs multiply_low(Pairs a, uint32_t by) {
#if defined(__AVX512F__)
    return (Pairs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
    return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(by));
#else
    return (a & 0xffffffffull) * uint64_t(by);
#endif
  }

  static void multiply(Words a, uint32_t by, Words& high, Words& low) {
    const Pairs even = multiply_low((Pairs)a, by), odd = multiply_low((Pairs)a >> 32, by);
    high = (Words)(even >> 32 | (odd & 0xffffffff00000000ull));
    low = (Words)((even & 0xffffffffull) | odd << 32);
  }

  // Gumbel noise -log(e), e = -log(1 - u), u = (word + 1/2) / 2^32: word w of counter q + lane is that of token 4 (q + lane) +
  // w.
  static void make_noise(float* noise, uint32_t quad, uint64_t seed, uint32_t position) {
    for (int from = 0; from < kBlock / 4; from += kWidth, quad += kWidth) {
      Words c[4] = {Words{}, position + Words{}, Words{}, Words{}};
      for (int lane = 0; lane < kWidth; ++lane) c[0][lane] = quad + lane;
      uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        Words high0, low0, high1, low1;
        multiply(c[0], 0xD2511F53u, high0, low0);
        multiply(c[2], 0xCD9E8D57u, high1, low1);
        c[0] = high1 ^ c[1] ^ key0, c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
      }
      for (int word = 0; word < 4; ++word) {
        Floats u = (__builtin_convertvector(c[word], Floats) + 0.5f) * 0x1p-32f;
        u = u < 1 - 0x1p-24f ? u : splat(1 - 0x1p-24f);
        const Floats y = 1.0f - u, gap = 1.0f - y;  // log(1 - u) = log(y) u / (1 - y): the rounding of y cancels (Goldberg)
        const Floats e = gap == 0.0f ? u : -log_floats(y) * u / (gap == 0.0f ? splat(1) : gap);
        const Floats value = -log_floats(e);
        for (int lane = 0; lane < kWidth; ++lane) noise[4 * (from + lane) + word] = value[lane];
      }
    }
  }

  int64_t blocks_;
  float *scores_, *maxima_, *bounds_;
  int32_t* candidates_;
  float top_ = 0;
};

void draw_rows(const void* job, int64_t begin, int64_t end) {
  const Draw& d = *static_cast<const Draw*>(job);
  for (int64_t at = begin; at < end; ++at) {
    const float temperature = d.temperature[at];
    Row row(d.scratch + at * scratch_floats(d.n), d.n);
    d.chosen[at] = -1;
    if (!row.read(d.logits, at * d.n, d.n, d.dtype, temperature == 0 ? 1 : temperature)) continue;
    d.chosen[at] = row.likeliest();
    if (temperature == 0) continue;
    if (d.top_k[at] < d.n) row.keep_top_k(d.top_k[at]);
    if (d.rest[at] > 0) row.keep_top_p(d.rest[at]);
    if (d.min_p[at] > 0) row.keep_min_p(d.min_p[at]);
    d.chosen[at] = row.race(static_cast<uint64_t>(d.seed[at]), static_cast<uint32_t>(d.position[at]));
  }
}

}  // namespace
}  // namespace qk

// Scratch memory for a row of n logits, in floats.
QK_EXPORT int64_t qk_draw_scratch(int64_t n) { return qk::scratch_floats(n); }

QK_EXPORT int32_t qk_draw(const void* logits, const float* temperature, const int32_t* top_k, const float* rest,
                          const float* min_p, const int64_t* seed, const int32_t* position, int32_t* chosen, float* scratch,
                          int64_t rows, int64_t n, int32_t dtype, int32_t threads) {
  qk::Draw job{logits, temperature, top_k, rest, min_p, seed, position, chosen, scratch, n, dtype};
  qk::parallel_for(rows, 1, threads, qk::draw_rows, &job);
  return 0;
}

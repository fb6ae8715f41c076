// Learning scales and codes: the gradient of a KL divergence by logits, and element-wise passes over a weight.
//
// The algorithms are those of quantkit/numerics/divergence.py and quantkit/nn/learned.py; here each of them passes through
// memory once. Every group is summed by a single thread, so results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <memory>

#include "parallel.h"
#include "vector.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

namespace qk {
namespace {

typedef int8_t SignedBytesAnywhere __attribute__((vector_size(kWidth), aligned(1)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));

constexpr float kLowest = -1e30f;  // used as minus infinity; differences of two are finite

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

inline Floats larger(Floats x, Floats y) { return x < y ? y : x; }

// e^x for x <= 0, relative error below 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and n added to the
// exponent.
inline Floats exp_negative(Floats x) {
  x = larger(x, splat(-87.0f));
  const Floats n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Floats p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

struct Divergence {
  const void* logits;  // (rows, vocabulary)
  const void* teacher; // (rows, vocabulary)
  void* gradient;      // (rows, vocabulary), may be logits
  double* total;       // (rows,)
  int64_t vocabulary;
  int32_t dtype;
};

// Copy a row as floats, padded to whole registers, and return its largest value.
float read_row(const void* from, int64_t at, int64_t count, int32_t dtype, float* row) {
  Floats top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Floats x = load_floats(from, at + i, dtype);
    *reinterpret_cast<FloatsAnywhere*>(row + i) = x;
    top = larger(top, x);
  }
  float best = -INFINITY;
  for (int lane = 0; lane < kWidth; ++lane) best = top[lane] > best ? top[lane] : best;
  for (; i < count; ++i) row[i] = load_one(from, at + i, dtype), best = row[i] > best ? row[i] : best;
  for (; i % kWidth; ++i) row[i] = kLowest;
  return best;
}

void divergence_rows(const void* job, int64_t begin, int64_t end) {
  const Divergence& d = *static_cast<const Divergence*>(job);
  const int64_t padded = (d.vocabulary + kWidth - 1) / kWidth * kWidth;
  std::unique_ptr<float[]> memory(new float[2 * padded]);
  float *q = memory.get(), *p = q + padded;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * d.vocabulary;
    const Floats top_q = splat(read_row(d.logits, at, d.vocabulary, d.dtype, q));
    const Floats top_p = splat(read_row(d.teacher, at, d.vocabulary, d.dtype, p));
    double sum_q = 0, sum_p = 0, cross = 0;
    for (int64_t first = 0; first < padded; first += 256 * kWidth) {  // sums of short stretches in float, their sum in double
      Floats part_q{}, part_p{}, part{};
      for (int64_t i = first; i < std::min(padded, first + 256 * kWidth); i += kWidth) {
        FloatsAnywhere& at_q = *reinterpret_cast<FloatsAnywhere*>(q + i);
        FloatsAnywhere& at_p = *reinterpret_cast<FloatsAnywhere*>(p + i);
        const Floats a = larger(at_p - top_p, splat(kLowest)), b = larger(at_q - top_q, splat(kLowest));
        const Floats e_p = exp_negative(a), e_q = exp_negative(b);
        part_q += e_q, part_p += e_p, part += e_p * (a - b);
        at_q = e_q, at_p = e_p;
      }
      sum_q += sum(part_q), sum_p += sum(part_p), cross += sum(part);
    }
    d.total[row] = cross / sum_p + std::log(sum_q) - std::log(sum_p);
    const Floats by_q = splat(static_cast<float>(1 / sum_q)), by_p = splat(static_cast<float>(1 / sum_p));
    int64_t i = 0;
    for (; i + kWidth <= d.vocabulary; i += kWidth) {
      const Floats slope = *reinterpret_cast<FloatsAnywhere*>(q + i) * by_q - *reinterpret_cast<FloatsAnywhere*>(p + i) * by_p;
      store_floats(d.gradient, at + i, d.dtype, slope);
    }
    for (; i < d.vocabulary; ++i) store_one(d.gradient, at + i, d.dtype, q[i] * by_q[0] - p[i] * by_p[0]);
  }
}

struct Groups {
  const int8_t* levels;  // (groups, size)
  float* scale;          // (groups,)
  void* weight;          // (groups, size)
  int64_t size;
  int32_t dtype;
};

inline Floats load_levels(const int8_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const SignedBytesAnywhere*>(p), Floats);
}

void expand_groups(const void* job, int64_t begin, int64_t end) {
  const Groups& g = *static_cast<const Groups*>(job);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t at = group * g.size;
    const Floats scale = splat(g.scale[group]);
    int64_t i = 0;
    for (; i + kWidth <= g.size; i += kWidth) store_floats(g.weight, at + i, g.dtype, load_levels(g.levels + at + i) * scale);
    for (; i < g.size; ++i) store_one(g.weight, at + i, g.dtype, g.levels[at + i] * scale[0]);
  }
}

void reduce_groups(const void* job, int64_t begin, int64_t end) {
  const Groups& g = *static_cast<const Groups*>(job);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t at = group * g.size;
    Floats total{};
    int64_t i = 0;
    for (; i + kWidth <= g.size; i += kWidth) total += load_levels(g.levels + at + i) * load_floats(g.weight, at + i, g.dtype);
    float rest = sum(total);
    for (; i < g.size; ++i) rest += g.levels[at + i] * load_one(g.weight, at + i, g.dtype);
    g.scale[group] = rest;
  }
}

struct Drift {
  void* drift;        // float16 (groups, size): offset of the learned value from the level
  const void* slope;  // (groups, size), only its sign counts; null to settle
  int8_t* levels;     // (groups, size)
  const int8_t* low;  // (groups,) lowest level
  int64_t size;
  int32_t dtype, span;  // highest level = low + span
  float rate;
};

inline Floats sign(Floats x) { return __builtin_convertvector((x < Floats{}) - (x > Floats{}), Floats); }  // true is -1

void drift_groups(const void* job, int64_t begin, int64_t end) {
  const Drift& d = *static_cast<const Drift*>(job);
  int64_t i = begin * d.size;
  for (; i + kWidth <= end * d.size; i += kWidth) {
    const Floats moved = load_floats(d.drift, i, kFloat16) - splat(d.rate) * sign(load_floats(d.slope, i, d.dtype));
    store_floats(d.drift, i, kFloat16, moved);
  }
  for (; i < end * d.size; ++i) {
    const float slope = load_one(d.slope, i, d.dtype);
    store_one(d.drift, i, kFloat16, load_one(d.drift, i, kFloat16) - d.rate * static_cast<float>((slope > 0) - (slope < 0)));
  }
}

inline Floats clamp(Floats x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

void settle_groups(const void* job, int64_t begin, int64_t end) {
  const Drift& d = *static_cast<const Drift*>(job);
  for (int64_t group = begin; group < end; ++group) {
    const float low = d.low[group], high = low + static_cast<float>(d.span);
    const int64_t stop = (group + 1) * d.size;
    int64_t i = group * d.size;
    for (; i + kWidth <= stop; i += kWidth) {
      const Floats level = load_levels(d.levels + i), drift = load_floats(d.drift, i, kFloat16);
      const Floats moved = clamp(level + ((drift + 0x1.8p23f) - 0x1.8p23f), low, high);
      store_floats(d.drift, i, kFloat16, clamp(level + drift - moved, -0.5f, 0.5f));
      *reinterpret_cast<SignedBytesAnywhere*>(d.levels + i) = __builtin_convertvector(moved, SignedBytesAnywhere);
    }
    for (; i < stop; ++i) {
      const float level = d.levels[i], drift = load_one(d.drift, i, kFloat16);
      const float moved = std::fmin(std::fmax(level + std::nearbyint(drift), low), high);
      store_one(d.drift, i, kFloat16, std::fmin(std::fmax(level + drift - moved, -0.5f), 0.5f));
      d.levels[i] = static_cast<int8_t>(moved);
    }
  }
}

struct Fake {
  const void* weight;  // (groups, size)
  const float* scale;  // (groups,) as stored
  const float* low;    // (groups,) level of code 0
  const void* slope;   // (groups, size) gradient of what is rounded; null to round
  void* out;           // (groups, size): what is rounded, in dtype; or its weight's gradient, float32
  float* by_scale;     // (groups,)
  float* by_low;       // (groups,)
  int64_t size;
  int32_t weight_dtype, dtype;  // dtype of slope, or of what is rounded
  float span;                   // highest level = low + span
};

// Clamping first keeps the sum below 2^22, where adding 1.5 * 2^23 rounds to the nearest whole number, ties to even.
inline Floats nearest_level(Floats steps, float low, float high) { return (clamp(steps, low, high) + 0x1.8p23f) - 0x1.8p23f; }

inline float nearest_level(float steps, float low, float high) {
  return std::nearbyint(std::fmin(std::fmax(steps, low), high)) + 0.0f;  // no negative zero
}

void fake_groups(const void* job, int64_t begin, int64_t end) {
  const Fake& f = *static_cast<const Fake*>(job);
  for (int64_t group = begin; group < end; ++group) {
    const float low = f.low[group], high = low + f.span;
    const Floats scale = splat(f.scale[group]);
    const int64_t stop = (group + 1) * f.size;
    int64_t i = group * f.size;
    for (; i + kWidth <= stop; i += kWidth) {
      store_floats(f.out, i, f.dtype, nearest_level(load_floats(f.weight, i, f.weight_dtype) / scale, low, high) * scale);
    }
    for (; i < stop; ++i) {
      store_one(f.out, i, f.dtype, nearest_level(load_one(f.weight, i, f.weight_dtype) / scale[0], low, high) * scale[0]);
    }
  }
}

// The gradients by weight, scale and lowest level; the rounding counts as the identity, and stops where it clips.
void fake_gradient_groups(const void* job, int64_t begin, int64_t end) {
  const Fake& f = *static_cast<const Fake*>(job);
  float* out = static_cast<float*>(f.out);
  for (int64_t group = begin; group < end; ++group) {
    const float low = f.low[group], high = low + f.span;
    const Floats scale = splat(f.scale[group]), lowest = splat(low - 0.5f), highest = splat(high + 0.5f);
    const int64_t stop = (group + 1) * f.size;
    int64_t i = group * f.size;
    Floats by_scale{}, by_low{};
    for (; i + kWidth <= stop; i += kWidth) {
      const Floats steps = load_floats(f.weight, i, f.weight_dtype) / scale, slope = load_floats(f.slope, i, f.dtype);
      const Floats level = nearest_level(steps, low, high);
      const Ints inside = (steps >= lowest) & (steps <= highest);
      *reinterpret_cast<FloatsAnywhere*>(out + i) = inside ? slope : Floats{};
      by_scale += slope * (inside ? level - steps : level);
      by_low += inside ? Floats{} : slope;
    }
    float rest_scale = sum(by_scale), rest_low = sum(by_low);
    for (; i < stop; ++i) {
      const float steps = load_one(f.weight, i, f.weight_dtype) / scale[0], slope = load_one(f.slope, i, f.dtype);
      const float level = nearest_level(steps, low, high);
      const bool inside = steps >= lowest[0] && steps <= highest[0];
      out[i] = inside ? slope : 0.0f;
      rest_scale += slope * (inside ? level - steps : level);
      rest_low += inside ? 0.0f : slope;
    }
    f.by_scale[group] = rest_scale;
    f.by_low[group] = rest_low * scale[0];
  }
}

}  // namespace
}  // namespace qk

// out = round(weight / scale) * scale on each group's grid.
QK_EXPORT int32_t qk_fake(const void* weight, const float* scale, const float* low, void* out, float span, int64_t groups,
                          int64_t size, int32_t weight_dtype, int32_t dtype, int32_t threads) {
  qk::Fake job{weight, scale, low, nullptr, out, nullptr, nullptr, size, weight_dtype, dtype, span};
  qk::parallel_for(groups, 256, threads, qk::fake_groups, &job);
  return 0;
}

QK_EXPORT int32_t qk_fake_gradient(const void* weight, const float* scale, const float* low, const void* slope, float* by_weight,
                                   float* by_scale, float* by_low, float span, int64_t groups, int64_t size,
                                   int32_t weight_dtype, int32_t dtype, int32_t threads) {
  qk::Fake job{weight, scale, low, slope, by_weight, by_scale, by_low, size, weight_dtype, dtype, span};
  qk::parallel_for(groups, 256, threads, qk::fake_gradient_groups, &job);
  return 0;
}

// drift -= rate * sign(slope)
QK_EXPORT int32_t qk_drift(void* drift, const void* slope, float rate, int64_t groups, int64_t size, int32_t dtype, int32_t threads) {
  qk::Drift job{drift, slope, nullptr, nullptr, size, dtype, 0, rate};
  qk::parallel_for(groups, 256, threads, qk::drift_groups, &job);
  return 0;
}

// levels += round(drift), inside low .. low + span; drift keeps the rest.
QK_EXPORT int32_t qk_settle(int8_t* levels, void* drift, const int8_t* low, int32_t span, int64_t groups, int64_t size,
                            int32_t threads) {
  qk::Drift job{drift, nullptr, levels, low, size, 0, span, 0};
  qk::parallel_for(groups, 256, threads, qk::settle_groups, &job);
  return 0;
}

QK_EXPORT int32_t qk_divergence(const void* logits, const void* teacher, void* gradient, double* total, int64_t rows,
                                int64_t vocabulary, int32_t dtype, int32_t threads) {
  qk::Divergence job{logits, teacher, gradient, total, vocabulary, dtype};
  qk::parallel_for(rows, 4, threads, qk::divergence_rows, &job);
  return 0;
}

// weight = levels * scale, group by group.
QK_EXPORT int32_t qk_expand_groups(const int8_t* levels, float* scale, void* weight, int64_t groups, int64_t size, int32_t dtype,
                                   int32_t threads) {
  qk::Groups job{levels, scale, weight, size, dtype};
  qk::parallel_for(groups, 256, threads, qk::expand_groups, &job);
  return 0;
}

// scale = sum over the group of levels * weight.
QK_EXPORT int32_t qk_reduce_groups(const int8_t* levels, float* scale, void* weight, int64_t groups, int64_t size, int32_t dtype,
                                   int32_t threads) {
  qk::Groups job{levels, scale, weight, size, dtype};
  qk::parallel_for(groups, 256, threads, qk::reduce_groups, &job);
  return 0;
}

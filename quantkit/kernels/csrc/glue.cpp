// The functions between matrix products: exponential, norms, activations.
#include <cmath>

#include "decoder.h"

namespace qk {

namespace {

float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// Call f(offset, x) for every whole register of a row, and for a zero-padded copy of the rest.
template <typename F>
void each(const float* x, int64_t width, F f) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) f(i, load(x + i));
  if (i < width) {
    Floats tail = {};
    for (int64_t j = i; j < width; ++j) tail[j - i] = x[j];
    f(i, tail);
  }
}

void put(float* y, int64_t i, int64_t width, Floats value) {
  if (i + kWidth <= width) return store(y + i, value);
  for (int64_t j = i; j < width; ++j) y[j] = value[j - i];
}

Floats logistic(Floats x) { return 1.0f / (1.0f + exp_floats(-x)); }

Floats activation_of(int32_t kind, Floats x) {
  switch (kind) {
    case 0: return x * logistic(x);                                                    // silu
    case 1: {                                                                          // gelu
      Floats y;
      for (int i = 0; i < kWidth; ++i) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
      return y;
    }
    case 2: return x * logistic(1.59576912f * (x + 0.044715f * x * x * x));            // gelu_tanh, tanh as a logistic
    default: {
      const Floats positive = x > 0.0f ? x : Floats{};
      return kind == 3 ? positive : positive * positive;                               // relu, relu2
    }
  }
}

}  // namespace

void normalize_row(const Norm& norm, const float* x, float* y) {
  const int64_t n = norm.width;
  if (!norm.gain) {
    if (x != y) memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  Floats total = {};
  float mean = 0;
  if (norm.center) {
    each(x, n, [&](int64_t, Floats v) { total += v; });
    mean = sum(total) / static_cast<float>(n);
    total = Floats{};
  }
  each(x, n, [&](int64_t i, Floats v) {
    v -= mean;
    if (i + kWidth > n)
      for (int64_t j = n - i; j < kWidth; ++j) v[j] = 0;  // the padding is not part of the row
    total += v * v;
  });
  const float scale = 1.0f / sqrtf(sum(total) / static_cast<float>(n) + norm.eps);
  each(x, n, [&](int64_t i, Floats v) {
    Floats result = (v - mean) * scale;
    if (i + kWidth <= n) {
      result *= load(norm.gain + i);
      if (norm.shift) result += load(norm.shift + i);
      store(y + i, result);
    } else {
      for (int64_t j = i; j < n; ++j) y[j] = result[j - i] * norm.gain[j] + (norm.shift ? norm.shift[j] : 0.0f);
    }
  });
}

// y = act(x), or act(gate) * up for x = [gate | up].
void activate_row(int32_t activation, bool gated, const float* x, float* y, int64_t width) {
  each(x, width, [&](int64_t i, Floats gate) {
    Floats value = activation_of(activation, gate);
    if (gated) {
      Floats up = {};
      if (i + kWidth <= width) up = load(x + width + i);
      else for (int64_t j = i; j < width; ++j) up[j - i] = x[width + j];
      value *= up;
    }
    put(y, i, width, value);
  });
}

}  // namespace qk

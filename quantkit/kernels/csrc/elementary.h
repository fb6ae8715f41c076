// Exponential and logarithm of a register of floats.
#pragma once
#include "vector.h"

namespace qk {

// exp(x) = 2^n * exp(r) with n = round(x / ln 2); the polynomial is Cephes' expf, good to 2 units in the last place.
inline Floats exp_floats(Floats x) {
  const Floats low = splat(-87.3f), high = splat(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Floats)exponent;
}

inline Floats load(const float* p) { return *reinterpret_cast<const FloatsAnywhere*>(p); }
inline void store(float* p, Floats value) { *reinterpret_cast<FloatsAnywhere*>(p) = value; }

// ln(x) for normal x > 0: x = 2^n m with m between sqrt(1/2) and sqrt(2), ln m = 2 artanh((m - 1) / (m + 1)), its series to
// s^9.
inline Floats log_floats(Floats x) {
  const Ints n = ((Ints)x - 0x3f3504f3) >> 23;
  const Floats m = (Floats)((Ints)x - (n << 23)), s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Floats p = splat(2.0f / 9);
  p = p * square + 2.0f / 7;
  p = p * square + 2.0f / 5;
  p = p * square + 2.0f / 3;
  const Floats whole = to_floats(n);
  return whole * 0.693359375f + (2.0f * s + (s * square * p - whole * 2.12194440e-4f));
}

}  // namespace qk

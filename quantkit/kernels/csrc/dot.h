// Dot products in one instruction, a register of them at a time: four unsigned codes times signed int8 activations, and two
// bfloat16 numbers times two.
//
// With VNNI, and ARM's i8mm, this is one instruction; ARM's dotprod has it for signed codes (code - 128). Without, x86
// multiplies bytes in pairs whose int16 sum saturates: codes of up to 7 bits stay below (2 * 127 * 127), wider ones are made
// signed (code - 128) and their sign is moved to the activation, which bounds a pair by 2 * 128 * 127 = 32512. kDotOffset is
// what such a code has lost; callers take it off the zero point too.
#pragma once
#include "vector.h"
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace qk {

typedef int8_t SmallAnywhere __attribute__((vector_size(kWidth), aligned(1)));

inline Ints splat_four(const int8_t* p) {  // four activations to every lane
  int32_t value;
  memcpy(&value, p, 4);
  return splat_int(value);
}

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define QK_DOT "vnni"
struct Codes {
  Ints value;
};
template <bool WIDE>
constexpr int32_t kDotOffset = 0;
constexpr bool kDotWhole = true;  // whether activations of -128 are multiplied by wide codes
template <bool WIDE>
inline Codes codes(Words word) {
  return {(Ints)word};
}
#if defined(__AVX512F__)
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)c.value, (__m512i)x);
}
inline Ints add_product(Ints sum, Ints a, Ints b) { return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#else
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)c.value, (__m256i)x);
}
inline Ints add_product(Ints sum, Ints a, Ints b) {
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
}
#endif

#elif defined(__AVX2__) && (!defined(__AVX512F__) || defined(__AVX512BW__))
#define QK_DOT "maddubs"
struct Codes {
  Ints value, magnitude;  // magnitude: of wide codes
};
template <bool WIDE>
constexpr int32_t kDotOffset = WIDE ? 128 : 0;
constexpr bool kDotWhole = false;
#if defined(__AVX512BW__)
template <bool WIDE>
inline Codes codes(Words word) {
  const __m512i value = (__m512i)(WIDE ? word ^ 0x80808080u : word);
  return {(Ints)value, WIDE ? (Ints)_mm512_abs_epi8(value) : (Ints)value};
}
inline Ints add_product(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  __m512i signed_x = (__m512i)x;
  if (WIDE) signed_x = _mm512_mask_sub_epi8(signed_x, _mm512_movepi8_mask((__m512i)c.value), _mm512_setzero_si512(), signed_x);
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)c.magnitude, signed_x);
  return add_product(sum, (Ints)pairs, (Ints)_mm512_set1_epi16(1));
}
#else
template <bool WIDE>
inline Codes codes(Words word) {
  const __m256i value = (__m256i)(WIDE ? word ^ 0x80808080u : word);
  return {(Ints)value, WIDE ? (Ints)_mm256_abs_epi8(value) : (Ints)value};
}
inline Ints add_product(Ints sum, Ints a, Ints b) { return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  const __m256i signed_x = WIDE ? _mm256_sign_epi8((__m256i)x, (__m256i)c.value) : (__m256i)x;
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)c.magnitude, signed_x);
  return add_product(sum, (Ints)pairs, (Ints)_mm256_set1_epi16(1));
}
#endif

#else
struct Codes {
  Words value;
};
// a's low 16 bits, signed, times b; what x86 has an instruction for
inline Ints add_product(Ints sum, Ints a, Ints b) { return sum + ((a << 16) >> 16) * b; }
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedCodes = true;  // the instruction takes two signed operands
#else
constexpr bool kSignedCodes = false;
#endif
template <bool WIDE>
constexpr int32_t kDotOffset = WIDE && kSignedCodes ? 128 : 0;
constexpr bool kDotWhole = true;
template <bool WIDE>
inline Codes codes(Words word) {
  return {WIDE && kSignedCodes ? word ^ 0x80808080u : word};
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define QK_DOT "i8mm"
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  return (Ints)vusdotq_s32((int32x4_t)sum, (uint8x16_t)c.value, (int8x16_t)x);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define QK_DOT "dotprod"
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)c.value, (int8x16_t)x);
}
#else
#define QK_DOT "plain"
template <bool WIDE>
inline Ints dot(Ints sum, Codes c, Ints x) {
  for (int j = 0; j < 4; ++j) {
    const Ints code = (Ints)((c.value >> (8 * j)) & 0xffu);
    sum += code * ((x << (24 - 8 * j)) >> 24);
  }
  return sum;
}
#endif
#endif

// sum + w0 * x0 + w1 * x1 of the bfloat16 pairs in every lane, each product exact and every sum rounded to float32.
#if defined(__AVX512BF16__)
#define QK_PAIRS " bf16"
constexpr bool kDotPairs = true;
inline Floats dot_pairs(Words w, Words x, Floats sum) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}
inline Words look_up_pairs(Words index, const uint16_t* table) {
  return (Words)_mm512_maskz_permutexvar_epi16(0xffffffffu, (__m512i)index, _mm512_loadu_si512(table));
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define QK_PAIRS " bf16"
constexpr bool kDotPairs = true;
inline Floats dot_pairs(Words w, Words x, Floats sum) {
  return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)w, (bfloat16x8_t)x);
}
#else
#define QK_PAIRS ""
constexpr bool kDotPairs = false;
inline Floats dot_pairs(Words, Words, Floats sum) { return sum; }
#endif

// table[index % 32] for the two halves of every lane.
#if !defined(__AVX512BF16__)
inline Words look_up_pairs(Words index, const uint16_t* table) {
  Words result;
  for (int i = 0; i < kWidth; ++i) result[i] = table[index[i] & 31u] | static_cast<uint32_t>(table[index[i] >> 16 & 31u]) << 16;
  return result;
}
#endif

}  // namespace qk

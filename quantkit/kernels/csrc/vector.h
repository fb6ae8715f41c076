// A vector register, on any machine.
//
// Vector types of GCC and Clang compile to the target's instructions, so one source is both fast and portable. The width is the
// target's: types wider than a register also compile, but use memory. Only the conversion of half floats depends on the target.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace qk {

constexpr int kLanes = 16;  // rows per block of the weight layout, on every machine
#if defined(__AVX512F__)
constexpr int kWidth = 16;  // rows per register
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;  // registers per block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32
#else
constexpr bool kManyRegisters = false;  // 16 or fewer
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntsAnywhere __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint32_t WordsAnywhere __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef float FloatsAnywhere __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(kWidth * 2), aligned(2)));
typedef uint8_t BytesAnywhere __attribute__((vector_size(kWidth), aligned(1)));

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// A difference: x - 0 is x for every x, so it compiles to a broadcast; 0 + x is not x for -0 and would be an addition.
inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat_int(int32_t value) { return value + Ints{}; }

// a * b + c, rounded once if the machine can. The compiler would fuse some of them only (for some CPUs it avoids chains of
// fused operations), and the bits of a row would depend on the tile that computed it.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Explicit widening, where the generic conversion works lane by lane (GCC 12).
inline Ints load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  uint32_t four;
  memcpy(&four, p, 4);
  return (Ints)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
#else
  return __builtin_convertvector(*reinterpret_cast<const BytesAnywhere*>(p), Ints);
#endif
}

inline Ints load_signed_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  uint32_t four;
  memcpy(&four, p, 4);
  return (Ints)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
#else
  typedef int8_t SignedAnywhere __attribute__((vector_size(kWidth), aligned(1)));
  return __builtin_convertvector(*reinterpret_cast<const SignedAnywhere*>(p), Ints);
#endif
}

inline Words load_shorts(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (Words)vmovl_u16(vld1_u16(p));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(p), Words);
#endif
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// Half to float: move exponent and mantissa in place and multiply by 2^112, which also normalises subnormals exactly;
// infinity and NaN get the full exponent back.
inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#elif defined(__aarch64__)
  __fp16 value;
  memcpy(&value, &half, 2);
  return value;
#else
  uint32_t magnitude = half & 0x7fffu;
  float value = bits_to_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = bits_to_float((magnitude << 13) | 0x7f800000u);
  return bits_to_float(float_to_bits(value) | (static_cast<uint32_t>(half & 0x8000u) << 16));
#endif
}

inline Floats load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  Floats result;
  for (int i = 0; i < kWidth; ++i) result[i] = half_to_float(p[i]);
  return result;
#endif
}

// Float to half, to nearest even. Adding 0.5 * 2^e (the magnitude's unit in the last half-float place, scaled to float)
// lets the float adder do the rounding.
inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 rounded = static_cast<__fp16>(value);
  uint16_t half;
  memcpy(&half, &rounded, 2);
  return half;
#else
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                              // below 2^-14: a subnormal half
    float shifted = bits_to_float(magnitude) + 0.5f;                          // unit in the last place of [0.5, 1) is 2^-24
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
#endif
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // keep NaN quiet
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline HalvesAnywhere to_halves(Floats values) {
#if defined(__AVX512F__)
  return (HalvesAnywhere)_mm512_maskz_cvtps_ph(0xffff, (__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && defined(__F16C__)
  return (HalvesAnywhere)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (HalvesAnywhere)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)values));
#else
  HalvesAnywhere result;
  for (int i = 0; i < kWidth; ++i) result[i] = float_to_half(values[i]);
  return result;
#endif
}

inline HalvesAnywhere to_bfloats(Floats values) {
  Words bits = (Words)values, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Words nan = (Words)((bits & 0x7fffffffu) > 0x7f800000u);  // all ones where true
  return __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), HalvesAnywhere);
}

inline Floats load_bfloats(const uint16_t* p) {
  return (Floats)(load_shorts(p) << 16);
}

inline Floats load_floats(const void* p, int64_t i, int32_t dtype) {
  if (dtype == kFloat32) return *reinterpret_cast<const FloatsAnywhere*>(static_cast<const float*>(p) + i);
  const uint16_t* raw = static_cast<const uint16_t*>(p) + i;
  return dtype == kFloat16 ? load_halves(raw) : load_bfloats(raw);
}

inline void store_floats(void* p, int64_t i, int32_t dtype, Floats values) {
  if (dtype == kFloat32) {
    *reinterpret_cast<FloatsAnywhere*>(static_cast<float*>(p) + i) = values;
  } else {
    HalvesAnywhere* raw = reinterpret_cast<HalvesAnywhere*>(static_cast<uint16_t*>(p) + i);
    *raw = dtype == kFloat16 ? to_halves(values) : to_bfloats(values);
  }
}

inline float load_one(const void* p, int64_t i, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  uint16_t raw = static_cast<const uint16_t*>(p)[i];
  return dtype == kFloat16 ? half_to_float(raw) : bits_to_float(static_cast<uint32_t>(raw) << 16);
}

inline void store_one(void* p, int64_t i, int32_t dtype, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = dtype == kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

// table[index % 16] of every lane.
inline Floats look_up(Words index, const float* table) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by bit 3
#else
  Floats result;
  for (int i = 0; i < kWidth; ++i) result[i] = table[index[i] & 15u];
  return result;
#endif
}

// table[byte] of every byte, all of which are below 16.
inline Words look_up_bytes(Words index, const uint8_t* table) {
#if defined(__AVX512BW__)
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (Words)_mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, sixteen), (__m512i)index);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (Words)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), (__m256i)index);
#elif defined(__aarch64__)
  return (Words)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
#else
  Words result;
  for (int i = 0; i < kWidth; ++i) {
    uint32_t word = 0;
    for (int byte = 0; byte < 32; byte += 8) word |= static_cast<uint32_t>(table[index[i] >> byte & 15u]) << byte;
    result[i] = word;
  }
  return result;
#endif
}

// Floats of 8 bits, e4m3, from the highest byte of every lane; codes that mean NaN are taken for 480. A small float is the
// same bits at another place, too small by 2^120, subnormal ones included (unless the processor is told to flush those).
inline Floats from_e4m3(Words top_bytes) { return (Floats)((Words)((Ints)top_bytes >> 4) & 0x87f00000u) * 0x1p120f; }

// The nearest e4m3 to every number of magnitude up to 448, ties to even.
inline Floats to_e4m3(Floats value) {
  const Words bits = (Words)value;
  const Floats normal = (Floats)((bits + 0x7ffffu + (bits >> 20 & 1u)) & 0xfff00000u);
  const Floats small = (value + 0x1.8p14f) - 0x1.8p14f;  // a multiple of 2^-9
  return (Floats)(bits & 0x7fffffffu) < 0x1p-6f ? small : normal;
}

// While this lives, the processor computes with subnormal numbers, whatever the thread chose.
struct KeepSubnormals {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  KeepSubnormals() { _mm_setcsr(before & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(before); }
#endif
};

}  // namespace qk

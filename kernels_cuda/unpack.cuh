// Weight codes to tensor-core operands, exactly: code - zero_point is an integer that bfloat16 and half both hold.
//
// Layout (written by quantkit/kernels/fragments.py). A weight (N, K) is cut into tiles of 64 rows and, within a tile, steps of 64
// columns; a step is stored as the operands of four 16-row products, 16 bytes per lane. Lane (g = lane / 4, t = lane % 4) of the
// 16-row product number `part` holds rows `16 part + g` and `16 part + g + 8`, and of each half h of the step the columns
// 32 h + 8 t + 0..7: eight neighbours, so that activations are read as they lie. (A product sums over k in any order, as long as
// both operands use the same one.) Two products s = 0, 1 per half take columns 4 s + 0..3 of the eight.
//
//   4 bits: word 2h + s holds nibbles [row g: k0 | row g+8: k0 | g: k2 | g+8: k2 | g: k1 | g+8: k1 | g: k3 | g+8: k3], lowest first,
//           so shifting by 4 i and masking leaves operand i, its two columns in the two halves of a register.
//   8 bits: 16 bytes per half: words [s=0: row g, row g+8; s=1: g, g+8], a byte per column: also the operand of an 8-bit product.
#pragma once
#include "device.cuh"

namespace qk {

constexpr int kTileRows = 64, kStep = 64, kParts = 4;

// What is taken from a code, for the two rows of a lane: for 4 bits the register that the magic number makes of the zero point,
// otherwise 2^23 + zero point as a float's bits.
struct Zeros { uint32_t low, high; };

template <class T> struct Magic;  // a number whose lowest mantissa bits count ones: magic | q = value + q
template <> struct Magic<Half> { static constexpr uint32_t pair = 0x64006400; static constexpr float value = 1024; };
template <> struct Magic<BFloat16> { static constexpr uint32_t pair = 0x43004300; static constexpr float value = 128; };

constexpr float kWholes = 8388608.0f;  // 2^23: the same trick in float32, for bytes, which bfloat16's 7 bits cannot count

template <class T, int kBits> __device__ inline Zeros make_zeros(int low, int high) {
  if constexpr (kBits == 4) {
    float a = Magic<T>::value + low, b = Magic<T>::value + high;
    return {pack<T>(a, a), pack<T>(b, b)};
  } else {
    return {__float_as_uint(kWholes + low), __float_as_uint(kWholes + high)};
  }
}

// Four columns of one row, a byte each, as two registers.
template <class T> __device__ inline void unpack_bytes(uint32_t word, float zero, uint32_t& first, uint32_t& second) {
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 + i)) - zero;
  first = pack<T>(value[0], value[1]);
  second = pack<T>(value[2], value[3]);
}

// The operand `a` of product s (0 to 3) of a step, from the lane's words of one 16-row part: 4 (4 bits) or 8 (8 bits).
template <class T, int kBits> __device__ inline void unpack(const uint32_t* words, int s, Zeros zeros, uint32_t (&a)[4]) {
  if constexpr (kBits == 4) {
    uint32_t word = words[s];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = subtract<T>((word >> (4 * i) & 0x000f000f) | Magic<T>::pair, i & 1 ? zeros.high : zeros.low);
  } else {
    unpack_bytes<T>(words[2 * s], __uint_as_float(zeros.low), a[0], a[2]);
    unpack_bytes<T>(words[2 * s + 1], __uint_as_float(zeros.high), a[1], a[3]);
  }
}

}  // namespace qk

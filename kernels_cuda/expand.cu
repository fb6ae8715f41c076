// Rows of a weight as floats, for many tokens: so few at a time that they stay in the second cache until a dense product reads them.
#include "unpack.cuh"

namespace qk {

struct Expand {  // ExpandStruct of kernels/cuda/calls.py
  const uint4* codes;
  const uint4* scales;
  const uint2* zeros;
  void* out;  // (rows, k) of T
  int32_t tiles, first_tile, rows, k;  // `rows` counted from the first tile
  int32_t group_shift, zero_code, scales_are_bfloat16, bits, dtype, fp8;
};

// `zero` counts from 2^23, as the code does once it is the lowest bits of that float: no conversion, which few units do.
__device__ inline float code_value(uint32_t code, float zero, bool fp8) {
  if (!fp8) return __uint_as_float(0x4b000000u | code) - zero;
  uint32_t size = code & 127;  // e4m3's exponent bias is 7, half's is 15: shifted into a half, the value is 256 times too small
  float value = to_float(Half{uint16_t(size << 7)}) * 256.0f;
  return code & 128 ? -value : value;
}

// A block is a tile and 4 steps, a warp a step, a lane its own 16 bytes: 8 neighbouring columns of two rows at a time.
template <class T, int kBits> __global__ void __launch_bounds__(128) expand(Expand e) {
  const int lane = threadIdx.x % kWarp, steps = (e.k + kStep - 1) / kStep, step = blockIdx.y * 4 + threadIdx.x / kWarp;
  if (step >= steps) return;
  const int groups = ((e.k - 1) >> e.group_shift) + 1, tile = e.first_tile + blockIdx.x;
  const uint4* codes = e.codes + (int64_t(tile) * steps + step) * (kParts * kBits / 4 * kWarp);
  for (int part = 0; part < kParts; ++part) {
    alignas(16) uint32_t words[kBits];
    for (int i = 0; i < kBits / 4; ++i)
      *reinterpret_cast<uint4*>(words + 4 * i) = codes[(part * kBits / 4 + i) * kWarp + lane];
    for (int h = 0; h < 2; ++h) {
      const int column = step * kStep + h * 32 + lane % 4 * 8;
      if (column >= e.k) continue;
      const int64_t at = (int64_t(tile) * groups + (column >> e.group_shift)) * 8 + lane / 4;
      const uint32_t scales = reinterpret_cast<const uint32_t*>(e.scales + at)[part];
      const uint32_t zeros = e.zeros ? reinterpret_cast<const uint16_t*>(e.zeros + at)[part] : e.zero_code * 0x0101u;
      for (int r = 0; r < 2; ++r) {
        const int row = blockIdx.x * kTileRows + part * 16 + r * 8 + lane / 4;
        if (row >= e.rows) continue;
        const float scale = to_float_16(scales >> (16 * r) & 0xffff, e.scales_are_bfloat16), zero = kWholes + float(zeros >> (8 * r) & 255);
        float value[8];
        for (int i = 0; i < 8; ++i) {
          const int s = i / 4, pair = i / 2 % 2, odd = i % 2;
          const uint32_t code = kBits == 4 ? words[2 * h + s] >> (4 * (4 * odd + 2 * pair + r)) & 15
                                           : words[4 * h + 2 * s + r] >> (8 * (i % 4)) & 255;
          value[i] = code_value(code, zero, e.fp8) * scale;
        }
        T* out = static_cast<T*>(e.out) + int64_t(row) * e.k + column;
        if (e.k % 8 == 0) {
          *reinterpret_cast<uint4*>(out) = {pack<T>(value[0], value[1]), pack<T>(value[2], value[3]),
                                            pack<T>(value[4], value[5]), pack<T>(value[6], value[7])};
        } else {
          for (int i = 0; i < 8 && column + i < e.k; ++i) out[i] = from_float<T>(value[i]);
        }
      }
    }
  }
}

template <class T> int launch_expand(const Expand& e, void* stream) {
  dim3 grid(unsigned(e.tiles), unsigned((e.k + 4 * kStep - 1) / (4 * kStep)));
  return e.bits == 4 ? launch(expand<T, 4>, grid, 128, 0, stream, e) : launch(expand<T, 8>, grid, 128, 0, stream, e);
}

}  // namespace qk

QK_API int qk_expand(const qk::Expand* e, void* stream) {
  if (e->tiles == 0) return 0;
  return e->dtype == qk::kBFloat16 ? qk::launch_expand<qk::BFloat16>(*e, stream) : qk::launch_expand<qk::Half>(*e, stream);
}

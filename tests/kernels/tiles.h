// AMX's tile registers in plain C++, by its manual: what tiles are tested with where no processor has them.
// Included before everything else, it stands in for the intrinsics.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#undef __AMX_BF16__
#define __AMX_BF16__ 1
#define QK_TILES_EMULATED

namespace emulated {

struct TileShape {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

inline std::atomic<int64_t> products{0};
inline thread_local TileShape shape{};
inline thread_local uint8_t tile[8][16][64];

inline void need(bool right, const char* what) {
  if (!right) fprintf(stderr, "tiles: %s\n", what), abort();  // where the processor would fault
}

inline void configure(const void* from) {
  memcpy(&shape, from, sizeof shape);
  need(shape.palette == 1 && shape.start_row == 0, "palette");
  for (int i = 0; i < 16; ++i)
    need(i < 8 ? shape.rows[i] <= 16 && shape.bytes[i] <= 64 && (shape.rows[i] == 0) == (shape.bytes[i] == 0) : shape.rows[i] + shape.bytes[i] == 0,
         "shape");
  memset(tile, 0, sizeof tile);
}

inline void release() { shape = TileShape{}; }

inline void zero(int i) {
  need(shape.rows[i] != 0, "a tile that is not configured");
  memset(tile[i], 0, sizeof tile[i]);
}

inline void load(int i, const void* base, int64_t stride) {
  zero(i);
  for (int row = 0; row < shape.rows[i]; ++row) memcpy(tile[i][row], static_cast<const char*>(base) + row * stride, shape.bytes[i]);
}

inline void store(int i, void* base, int64_t stride) {
  need(shape.rows[i] != 0, "a tile that is not configured");
  for (int row = 0; row < shape.rows[i]; ++row) memcpy(static_cast<char*>(base) + row * stride, tile[i][row], shape.bytes[i]);
}

inline void fit(int sums, int a, int b) {
  need(shape.rows[sums] == shape.rows[a] && shape.bytes[sums] == shape.bytes[b] && shape.bytes[a] == 4 * shape.rows[b], "shapes differ");
  ++products;
}

// sums[m][n] += the sum over k and j of a[m][4 k + j], signed, times b[k][4 n + j], of type B
template <class B>
inline void multiply_bytes(int sums, int a, int b) {
  fit(sums, a, b);
  for (int m = 0; m < shape.rows[sums]; ++m)
    for (int n = 0; n < shape.bytes[sums] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &tile[sums][m][4 * n], 4);
      for (int k = 0; k < shape.rows[b]; ++k)
        for (int j = 0; j < 4; ++j) sum += static_cast<int8_t>(tile[a][m][4 * k + j]) * static_cast<B>(tile[b][k][4 * n + j]);
      memcpy(&tile[sums][m][4 * n], &sum, 4);
    }
}

inline float bfloat(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// sums[m][n] += the sum over k of a[m][2 k] * b[k][2 n], plus that of a[m][2 k + 1] * b[k][2 n + 1], of bfloat16 numbers
inline void multiply_bfloats(int sums, int a, int b) {
  fit(sums, a, b);
  for (int m = 0; m < shape.rows[sums]; ++m)
    for (int n = 0; n < shape.bytes[sums] / 4; ++n) {
      float sum, part[2] = {};
      memcpy(&sum, &tile[sums][m][4 * n], 4);
      for (int k = 0; k < shape.rows[b]; ++k)
        for (int j = 0; j < 2; ++j) part[j] = fmaf(bfloat(&tile[a][m][4 * k + 2 * j]), bfloat(&tile[b][k][4 * n + 2 * j]), part[j]);
      sum += part[0] + part[1];
      memcpy(&tile[sums][m][4 * n], &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbsud emulated::multiply_bytes<uint8_t>
#define _tile_dpbssd emulated::multiply_bytes<int8_t>
#define _tile_dpbf16ps emulated::multiply_bfloats

// The tile registers of AMX: eight, each of up to 16 rows of 64 bytes, and products of whole tiles.
//
// A library that was built for a processor with tiles requests permission from the system once per process. Without permission,
// or on another processor, only the speed changes. Where no processor has them, tests replace the intrinsics by plain C++
// (tests/kernels/tiles.h).
#pragma once
#include "vector.h"
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define QK_TILES " amx"
#define QK_HAS_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define QK_TILES ""
#endif

namespace qk {

constexpr int kTileRows = 16, kTileBytes = 64;

// Bytes of a row of x that tiles multiply at the same time, where a chunk has `bytes` of them.
inline int64_t tile_piece(int64_t bytes) { return bytes < kTileBytes ? bytes : kTileBytes; }

// Whether groups of `group` columns of `size` bytes, summed in chunks of up to `chunk` columns, are whole pieces of one size.
inline bool fits_tiles(int64_t group, int64_t chunk, int64_t size) {
  const int64_t padded = (group + 7) / 8 * 8, length = chunk < padded ? chunk : padded, piece = tile_piece(length * size);
  return length * size % piece == 0 && padded * size % piece == 0;
}

#if defined(QK_HAS_TILES)
#if defined(QK_TILES_EMULATED)
inline bool ask_for_tiles() { return true; }
#else
inline bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBFloat = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat | kTile | kInt8;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

inline bool tiles_granted() {
  static const bool granted = ask_for_tiles();
  return granted;
}

// GCC's intrinsics do not say what memory they read; this keeps writes to it before them.
inline void written(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// Tiles 0 to 3 hold sums, `rows` x 16 words; 4 and 5 hold `rows` rows of `columns` bytes; 6 and 7 hold what these are multiplied
// with, columns / 4 rows of 16 words. Released at the end, so that the system need not save them when it switches threads.
struct Tiles {
  Tiles(int64_t rows, int64_t columns) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shape{};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? columns : kTileBytes);
      shape.rows[i] = static_cast<uint8_t>(i < 6 ? rows : columns / 4);
    }
    written(&shape);
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};
#else
inline bool tiles_granted() { return false; }
#endif

}  // namespace qk

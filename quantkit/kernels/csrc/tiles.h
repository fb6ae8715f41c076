// The tile registers of AMX: eight, each of up to 16 rows of 64 bytes, and products of whole tiles.
//
// A library that was built for a processor with tiles requests permission from the system once per process. Without permission,
// or on another processor, only the speed changes. Not tested on hardware: tests replace the intrinsics by plain C++
// (tests/kernels/tiles.h).
#pragma once
#include "vector.h"
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512F__) && defined(__linux__)
#define QK_TILES " amx"
#define QK_HAS_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace qk {

constexpr int kTileRows = 16, kTileBytes = 64;

#if defined(QK_TILES_EMULATED)
inline bool ask_for_tiles() { return true; }
#else
inline bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

inline bool tiles_granted() {
  static const bool granted = ask_for_tiles();
  return granted;
}

// Tiles 0 and 1 hold sums, 16 x 16 int32; 2 holds 16 rows of `columns` bytes; 3 and 4 hold what these are multiplied with,
// columns / 4 rows of 16 words. Released at the end, so that the system need not save them when it switches threads.
struct Tiles {
  explicit Tiles(int64_t columns) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shape{};
    shape.palette = 1;
    for (int i = 0; i < 5; ++i) {
      shape.bytes[i] = static_cast<uint16_t>(i == 2 ? columns : kTileBytes);
      shape.rows[i] = static_cast<uint8_t>(i < 3 ? kTileRows : columns / 4);
    }
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

}  // namespace qk
#else
#define QK_TILES ""
#endif

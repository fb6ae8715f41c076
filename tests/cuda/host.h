// kernels_cuda/device.cuh on the CPU: runs CUDA kernels one block after another, each thread a fiber.
//
// What would be a race or a missing wait on a GPU shows here too: copies into shared memory land only when a wait says they must,
// threads run one at a time and only change places where they meet (barriers, exchanges, matrix products), shared memory starts
// as rubbish. Matrix products place their operands by the fragment tables of the PTX ISA (9.7.14, m16n8k16 and m16n8k32), which is
// the only thing here that knows about layouts.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define __launch_bounds__(...)
#define QK_API extern "C"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace qk {

struct Copy { void* to; const void* from; int size, bytes; };

struct Fiber {
  ucontext_t context;
  dim3 thread;
  int index, meetings = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Meeting { int arrived = 0; long turn = 0; };

struct Block {
  dim3 index, size, grid;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Meeting everyone;
  std::vector<Meeting> warps;
  std::vector<std::vector<uint32_t>> slots;  // (2 turns, threads): what lanes show each other
  std::vector<uint4> shared;
  std::function<void()> body;
};
inline Block* block;
inline Fiber* fiber;

inline void give_way() { swapcontext(&fiber->context, &block->scheduler); }

inline void meet(Meeting& meeting, int count) {
  long turn = meeting.turn;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.turn;
  }
  while (meeting.turn == turn) give_way();
}

inline void run_fiber() {
  block->body();
  fiber->done = true;
  give_way();
}

inline void run_block(Block& self) {
  constexpr size_t kStack = 64 * 1024;
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept: making them anew would take most of the time
  while (stacks.size() < self.fibers.size()) stacks.emplace_back(new char[kStack]);
  block = &self;
  for (Fiber& one : self.fibers) {
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = stacks[one.index].get();
    one.context.uc_stack.ss_size = kStack;
    one.context.uc_link = nullptr;
    makecontext(&one.context, run_fiber, 0);
  }
  for (int rounds = 0, left = 1; left; ++rounds) {
    left = 0;
    for (Fiber& one : self.fibers) {
      if (one.done) continue;
      fiber = &one;
      swapcontext(&self.scheduler, &one.context);
      left += !one.done;
    }
    if (rounds > 10000000) { fprintf(stderr, "threads wait for each other for ever\n"); abort(); }
  }
}

inline size_t shared_limit = 226 * 1024;
inline bool last_block_first = false;  // on a GPU blocks run in no order
inline size_t largest_shared_memory() { return shared_limit; }

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void*, Args... args) {
  if (shared > 227 * 1024 || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return 1;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block one;
        one.index = last_block_first ? dim3(grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z), one.size = dim3(threads), one.grid = grid;
        one.fibers.resize(threads);
        for (int i = 0; i < threads; ++i) one.fibers[i].thread = dim3(i, 0, 0), one.fibers[i].index = i;
        one.warps.resize((threads + 31) / 32);
        one.slots.assign(2, std::vector<uint32_t>(threads * 8));
        one.shared.assign((shared + 15) / 16, uint4{0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0, 0x7fc07fc0});
        one.body = [&] { kernel(args...); };
        run_block(one);
      }
  return 0;
}

#define threadIdx (qk::fiber->thread)
#define blockIdx (qk::block->index)
#define blockDim (qk::block->size)
#define gridDim (qk::block->grid)
inline void* shared_memory() { return block->shared.data(); }
inline void __syncthreads() { meet(block->everyone, int(block->fibers.size())); }
inline void __syncwarp() { meet(block->warps[fiber->index / 32], 32); }
inline void __threadfence() {}
inline int atomicAdd(int* to, int value) { int old = *to; *to += value; return old; }
template <class T> T fresh(const T* x) {  // on a GPU such a load of shared memory is an illegal address
  const char *at = reinterpret_cast<const char*>(x), *from = static_cast<const char*>(shared_memory());
  if (at >= from && at < from + block->shared.size() * sizeof(uint4)) { fprintf(stderr, "fresh() of shared memory\n"); abort(); }
  return *x;
}

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
inline float __uint_as_float(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float to_float(Half x) { _Float16 y; memcpy(&y, &x, 2); return float(y); }
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline Half from_float<Half>(float x) { _Float16 y = _Float16(x); Half h; memcpy(&h, &y, 2); return h; }
template <> inline BFloat16 from_float<BFloat16>(float x) {
  if (x != x) return {0x7fff};
  uint32_t u = __float_as_uint(x);
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <class T> uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T> uint32_t subtract(uint32_t a, uint32_t b) {
  return pack<T>(to_float(T{uint16_t(a)}) - to_float(T{uint16_t(b)}), to_float(T{uint16_t(a >> 16)}) - to_float(T{uint16_t(b >> 16)}));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = a | uint64_t(b) << 32;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return y;
}
inline float __fdividef(float x, float y) { return x / y; }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }

inline void copy(void* to, const void* from, int size, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | (bytes ? reinterpret_cast<uintptr_t>(from) : 0)) % size || bytes < 0 || bytes > size) {
    fprintf(stderr, "a copy of %d of %d bytes from %p to %p is not aligned\n", bytes, size, from, to);
    abort();
  }
  fiber->open.push_back({to, from, size, bytes});
}
inline void copy16_stream(void* to, const void* from, uint64_t) { copy(to, from, 16, 16); }
inline void copy16(void* to, const void* from, int bytes = 16) { copy(to, from, 16, bytes); }
inline void copy8(void* to, const void* from, int bytes = 8) { copy(to, from, 8, bytes); }
inline void copy4(void* to, const void* from, int bytes = 4) { copy(to, from, 4, bytes); }
inline uint64_t stream_policy(bool) { return 0; }
inline void copies_commit() { fiber->groups.push_back(std::move(fiber->open)); fiber->open.clear(); }
template <int kPending> void copies_wait() {
  auto& groups = fiber->groups;
  while (int(groups.size()) > kPending) {
    for (const Copy& one : groups.front()) {
      memset(one.to, 0, one.size);
      if (one.bytes) memcpy(one.to, one.from, one.bytes);
    }
    groups.erase(groups.begin());
  }
}

// Show `count` registers to the warp; returns those of all lanes, (32, 8). Two buffers in turn: nobody can be two ahead.
inline const uint32_t* show(const uint32_t* registers, int count) {
  int warp = fiber->index / 32;
  uint32_t* slots = block->slots[fiber->meetings++ & 1].data() + warp * 32 * 8;
  memcpy(slots + fiber->index % 32 * 8, registers, count * 4);
  meet(block->warps[warp], 32);
  return slots;
}
template <class T> T exchange(T x, int mask) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = show(&bits, 1)[((fiber->index % 32) ^ mask) * 8];
  memcpy(&x, &bits, 4);
  return x;
}

// Tensor cores. `kWide`: elements per register, so that k runs over 8 * kWide of them.
template <int kWide, class C, class Value>
void product(C (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const uint32_t* all = show(mine, 6);
  int lane = fiber->index % 32;
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 8 * kWide; ++k) {
      bool far = k >= 4 * kWide;
      int quad = k % (4 * kWide) / kWide;
      uint32_t left = all[(row % 8 * 4 + quad) * 8 + (far ? 2 : 0) + (row >= 8)];
      uint32_t right = all[(column * 4 + quad) * 8 + 4 + far];
      sum += value(left, k % kWide) * value(right, k % kWide);
    }
    c[i] += C(sum);
  }
}
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  product<2>(c, a, b0, b1, [](uint32_t word, int i) { return double(to_float(T{uint16_t(word >> (16 * i))})); });
}
inline void products_begin() {}
inline void products_commit() {}
inline void products_wait() {}
inline void show_products() {}
inline uint64_t tile_address(const void* at) { return reinterpret_cast<uintptr_t>(at); }
// A warp's rows of a product whose other operand lies in swizzled rows of 128 bytes (PTX ISA 9.7.15.5: 128-byte swizzle).
template <class T> void wide_mma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  const uint32_t* all = show(a, 4);
  const int lane = fiber->index % 32;
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 8 * j + lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = all[(row % 8 * 4 + k % 8 / 2) * 8 + (k >= 8 ? 2 : 0) + (row >= 8)];
        uint64_t at = b + column * 128 + k * 2;
        at ^= (at >> 7 & 7) << 4;
        sum += double(to_float(T{uint16_t(left >> (k % 2 * 16))})) * to_float(*reinterpret_cast<const T*>(at));
      }
      d[j][i] += float(sum);
    }
  meet(block->warps[fiber->index / 32], 32);
}
inline float fp8_value(uint32_t code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float size = exponent ? ldexpf(1 + mantissa / 8.0f, exponent - 7) : ldexpf(mantissa / 8.0f, -6);
  return (code & 127) == 127 ? NAN : code & 128 ? -size : size;
}
inline void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  product<4>(c, a, b0, b1, [](uint32_t word, int i) { return double(int8_t(word >> (8 * i))); });
}
inline void mma_fp8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  product<4>(c, a, b0, b1, [](uint32_t word, int i) { return double(fp8_value(word >> (8 * i) & 255)); });
}
inline uint32_t fp8_code(float x) {
  if (x != x) return 127;
  uint32_t best = 0;
  for (uint32_t code = 0; code < 127; ++code) {
    float now = fabsf(fp8_value(code) - fabsf(x)), then = fabsf(fp8_value(best) - fabsf(x));
    if (now < then || (now == then && !(code & 1))) best = code;
  }
  return best | (x < 0 ? 128 : 0);
}
inline uint32_t pack_fp8(float a, float b, float c, float d) {
  return fp8_code(a) | fp8_code(b) << 8 | fp8_code(c) << 16 | fp8_code(d) << 24;
}

}  // namespace qk
using qk::__syncthreads, qk::__syncwarp, qk::__threadfence, qk::atomicAdd, qk::__byte_perm, qk::__uint_as_float, qk::__float_as_uint;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using qk::__fdividef, qk::__float2int_rn;

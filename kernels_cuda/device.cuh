// What the kernels ask of the machine, in one place: types, memory copies, tensor cores, warps, launches.
//
// Kernels are written against these functions alone. With nvcc they are PTX; tests/cuda/host.h gives each of them a meaning on the
// CPU (a thread is a fiber, a copy lands when it is waited for, a matrix product follows the fragment tables of the PTX ISA), so
// the very same kernels run, and are tested, on a machine without a GPU.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__

namespace qk {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T> __device__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two floats, rounded, in one register; `low` in the low half.
template <class T> __device__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <> __device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// a - b, half by half.
template <class T> __device__ uint32_t subtract(uint32_t a, uint32_t b);
template <> __device__ __forceinline__ uint32_t subtract<Half>(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
template <> __device__ __forceinline__ uint32_t subtract<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t y;  // sm_80 has no bf16 subtraction, but a fused multiply-add: 1 * a + (-b)
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
  return y;
}

// Copy 16, 8 or 4 bytes from global to shared memory behind the thread's back; beyond the first `bytes` zeros are written. Streams
// (weights) bypass the first cache, and stay in the second one as the policy says.
__device__ __forceinline__ void copy16_stream(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "l"(policy) : "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy8(void* to, const void* from, int bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy4(void* to, const void* from, int bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Lines that nobody reads `again` are the first to leave the second cache.
__device__ __forceinline__ uint64_t stream_policy(bool again) {
  uint64_t first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return again ? normal : first;
}

// c += a @ b for a (16, 16) and b (16, 8) of T, c float (16, 8), each spread over the warp as the PTX ISA tables say.
template <class T> __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define QK_MMA(type, shape, kinds, constraint)                                                                                 \
  asm volatile("mma.sync.aligned." shape ".row.col." kinds " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
      : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3])                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <> __device__ __forceinline__ void mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  QK_MMA(Half, "m16n8k16", "f32.f16.f16.f32", "f");
}
template <> __device__ __forceinline__ void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  QK_MMA(BFloat16, "m16n8k16", "f32.bf16.bf16.f32", "f");
}
// The same for a (16, 32) and b (32, 8) of bytes.
__device__ __forceinline__ void mma_int8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  QK_MMA(int, "m16n8k32", "s32.s8.s8.s32", "r");
}
__device__ __forceinline__ void mma_fp8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  QK_MMA(float, "m16n8k32", "f32.e4m3.e4m3.f32", "f");
#endif
}
// Hopper's products of four warps, which run on while their threads do something else: d (64, 128) += a (64, 16) @ b (16, 128).
// Each warp brings its 16 rows of a and keeps those of d, both spread as mma's are; b lies in shared memory, see `tile_address`.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QK_WGMMA(kinds)                                                                                                        \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16." kinds " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0; }"                           \
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),\
      "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),\
      "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),\
      "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),\
      "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),\
      "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),\
      "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),\
      "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
#else
#define QK_WGMMA(kinds) __trap()
__device__ __forceinline__ void products_begin() {}
__device__ __forceinline__ void products_commit() {}
__device__ __forceinline__ void products_wait() {}
#endif
template <class T> __device__ void wide_mma(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b);
template <> __device__ __forceinline__ void wide_mma<Half>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  QK_WGMMA("f32.f16.f16");
}
template <> __device__ __forceinline__ void wide_mma<BFloat16>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  QK_WGMMA("f32.bf16.bf16");
}
// Where b is: rows of 128 bytes, one per column of b, 16 elements of each from `at` on; 1024 bytes are 8 rows, in which the 16-byte
// piece c of row r lies in the place of piece c ^ r (the matrix descriptor of the PTX ISA, 128-byte swizzle, K first).
__device__ __forceinline__ uint64_t tile_address(const void* at) {
  return (uint64_t(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// What this thread has written to shared memory, such products see after the next barrier.
__device__ __forceinline__ void show_products() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Four floats as four fp8_e4m3, the first in the lowest byte; too large ones become the largest.
__device__ __forceinline__ uint32_t pack_fp8(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | uint32_t(high) << 16;
#else
  return 0;
#endif
}

__device__ __forceinline__ float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ int exchange(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float fresh(const float* x) { return __ldcg(x); }  // as another block wrote it
__device__ __forceinline__ float2 fresh(const float2* x) { return __ldcg(x); }
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 qk_shared[];
  return qk_shared;
}

// Bytes of shared memory that a block of this device may ask for.
inline size_t largest_shared_memory() {
  int device = 0, bytes = 48 * 1024;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return size_t(bytes) - 1024;  // what kernels declare themselves
}

// Launch on `stream`; returns the CUDA error code, 0 for none.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, void* stream, Args... args) {
  if (shared > 48 * 1024) {
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared))) return error;
  }
  kernel<<<grid, threads, shared, cudaStream_t(stream)>>>(args...);
  return cudaGetLastError();
}

}  // namespace qk

#else
#include "host.h"
#endif

namespace qk {

constexpr int kWarp = 32;
constexpr float kNegativeInfinity = -3.0e38f;  // finite, so that differences of two of them are numbers

enum DType { kHalf = 1, kBFloat16 = 2 };  // as DTYPE_CODES of kernels/build.py

__device__ inline float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += exchange(x, mask);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, exchange(x, mask));
  return x;
}

__device__ inline float to_float_16(uint32_t bits, bool bfloat16) {
  return bfloat16 ? to_float(BFloat16{uint16_t(bits)}) : to_float(Half{uint16_t(bits)});
}

}  // namespace qk

#ifdef __CUDACC__
#define QK_API extern "C" __attribute__((visibility("default")))
#endif

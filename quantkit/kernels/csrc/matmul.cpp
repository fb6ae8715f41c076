// The C interface of the matmul: one call is one product, split over torch's OpenMP team.
#include <atomic>
#include <cstdlib>
#include <memory>

#include "dot.h"
#include "linear.h"
#include "parallel.h"
#include "tiles.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

namespace qk {
namespace {

constexpr int64_t kBatch = 1020;  // rows of x that are rounded at a time

struct Free {
  void operator()(char* p) const { free(p); }
};

// Memory of one thread that can only grow, aligned to a cache line and freed when the thread ends; null if out of memory.
struct Scratch {
  std::unique_ptr<char, Free> memory;
  int64_t size = 0;
  char* get(int64_t bytes) {
    if (bytes > size) {
      memory.reset(static_cast<char*>(aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))));
      size = memory ? bytes : 0;
    }
    return memory.get();
  }
};

struct Call {
  Linear linear;
  Rows rows;
  const char* x;      // (m, columns) of `dtype`
  char* y;            // (m, rows) of `dtype`
  float *wide, *sum;  // x and y in float32; where `dtype` is float32, sum is y and wide is unused
  int32_t dtype;
  std::atomic<bool>* starved;
};

void prepare(const void* argument, int64_t begin, int64_t end) {
  const Call& call = *static_cast<const Call*>(argument);
  const int64_t last = end * call.rows.columns;
  int64_t i = begin * call.rows.columns;
  if (call.dtype != kFloat32) {
    for (; i + kWidth <= last; i += kWidth) store_floats(call.wide, i, kFloat32, load_floats(call.x, i, call.dtype));
    for (; i < last; ++i) call.wide[i] = load_one(call.x, i, call.dtype);
  }
  prepare_rows(call.rows, begin, end);
}

void multiply(const void* argument, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Call& call = *static_cast<const Call*>(argument);
  char* memory = scratch.get(kShareScratchBytes);
  if (!memory) return call.starved->store(true);
  linear_share(call.linear, call.rows, call.sum, call.linear.rows, begin, end, memory);
  if (call.dtype == kFloat32) return;
  const int64_t last = end * 16 < call.linear.rows ? end * 16 : call.linear.rows;
  for (int64_t m = 0; m < call.rows.m; ++m) {
    const int64_t row = m * call.linear.rows;
    int64_t i = begin * 16;
    for (; i + kWidth <= last; i += kWidth) store_floats(call.y, row + i, call.dtype, load_floats(call.sum, row + i, kFloat32));
    for (; i < last; ++i) store_one(call.y, row + i, call.dtype, call.sum[row + i]);
  }
}

// Rows of x [from, from + m) of a call.
bool run(Call call, int64_t m, int32_t threads) {
  static thread_local Scratch scratch;
  const int64_t wide = call.dtype == kFloat32 ? 0 : round_up(m * call.rows.columns * 4, 64);
  const int64_t sums = call.dtype == kFloat32 ? 0 : round_up(m * call.linear.rows * 4, 64);
  call.rows.m = m;
  char* memory = scratch.get(wide + sums + rows_bytes(call.rows) + 64);
  if (!memory) return false;
  call.wide = reinterpret_cast<float*>(memory);
  call.sum = reinterpret_cast<float*>(wide ? memory + wide : call.y);
  call.rows.x = wide ? call.wide : reinterpret_cast<const float*>(call.x);
  place_rows(call.rows, memory + wide + sums);
  std::atomic<bool> starved{false};
  call.starved = &starved;
  parallel_for(m, 16, threads, prepare, &call);
  // Few blocks: one range per thread. Many blocks: four, so that a thread that the system suspends delays the others less.
  const int64_t blocks = linear_blocks(call.linear), ranges = blocks < 32 * threads ? threads : 4 * threads;
  parallel_for(blocks, round_up((blocks + ranges - 1) / ranges, 2), threads, multiply, &call);
  return !starved;
}

}  // namespace
}  // namespace qk

QK_EXPORT int32_t qk_abi_version() { return 5; }

// Whether the machine multiplies bfloat16 numbers, and faster than floats.
QK_EXPORT int32_t qk_multiplies_bfloat16() { return qk::fast_pairs(); }

QK_EXPORT const char* qk_isa() {
#if defined(__AVX512F__)
  return "avx512 " QK_DOT QK_PAIRS QK_TILES;
#elif defined(__AVX2__)
  return "avx2 " QK_DOT;
#elif defined(__ARM_NEON)
  return "neon " QK_DOT QK_PAIRS;
#else
  return "portable";
#endif
}

// y (m, rows) = x (m, columns) @ w.T + bias, x and y of `dtype`, bias float32 or null. block: columns per int8 activation
// scale, 0 for float activations. Returns 0, or 2 if out of memory.
QK_EXPORT int32_t qk_linear(const qk::Linear* linear, const float* bias, const void* x, void* y, int64_t m, int64_t block,
                            int32_t dtype, int32_t threads) {
  using namespace qk;
  Call call{*linear, {}, nullptr, nullptr, nullptr, nullptr, dtype, nullptr};
  call.linear.bias = bias;
  call.rows.stride = call.rows.columns = linear->columns;
  fit_rows(call.rows, *linear, (block ? 1 << kFormInt8 : 0) | (dtype == kBFloat16 ? 1 << kFormBFloat16 : 0), block ? block : 8);
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  for (int64_t from = 0; from < m; from += kBatch) {
    call.x = static_cast<const char*>(x) + from * linear->columns * size;
    call.y = static_cast<char*>(y) + from * linear->rows * size;
    if (!run(call, m - from < kBatch ? m - from : kBatch, threads)) return 2;
  }
  return 0;
}

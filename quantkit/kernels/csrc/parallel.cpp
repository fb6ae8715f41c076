// Threads: borrow torch's OpenMP team instead of owning a pool.
//
// torch's OpenMP workers spin for milliseconds after every parallel op. A second pool fights them for the cores: on two
// cores, a decode step of 210 matmuls between torch ops was slower with a private spinning pool than on one thread.
// GOMP_parallel is the plain C entry of that runtime (libgomp; LLVM's and Intel's runtimes export it too); the caller
// finds it in the running process and hands it over, so this library links to no OpenMP. Without it, one thread.
//
// After fork the workers are gone but the runtime does not know: a forked child therefore stays on one thread.
#include "parallel.h"

#include <pthread.h>

#include <atomic>

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> team{nullptr};

struct Loop {
  qk::RangeBody body;
  const void* job;
  int64_t total, chunk;
  std::atomic<int64_t> next{0};
};

// Ranges are claimed one by one: a thread that the system has put aside delays only the range it holds.
void run(void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  for (;;) {
    int64_t begin = loop.next.fetch_add(loop.chunk, std::memory_order_relaxed);
    if (begin >= loop.total) return;
    int64_t end = begin + loop.chunk;
    loop.body(loop.job, begin, end < loop.total ? end : loop.total);
  }
}

void forget_team() { team.store(nullptr); }

}  // namespace

namespace qk {

void parallel_for(int64_t total, int64_t chunk, int32_t threads, RangeBody body, const void* job) {
  Parallel parallel = team.load(std::memory_order_relaxed);
  if (!parallel || threads <= 1 || total <= chunk) {
    if (total > 0) body(job, 0, total);
    return;
  }
  Loop loop{body, job, total, chunk};
  parallel(run, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace qk

extern "C" __attribute__((visibility("default"))) int32_t qk_use_openmp(void* gomp_parallel) {
  team.store(reinterpret_cast<Parallel>(gomp_parallel));
  return pthread_atfork(nullptr, nullptr, forget_team);
}

// The threads of a team.
//
// torch's OpenMP workers spin for milliseconds after every parallel operation, and a second pool competes with them for the
// cores: on two cores, a decode step of 210 products between torch operations was slower with a private spinning pool than on
// one thread. If the process has an OpenMP runtime (libgomp, or LLVM's and Intel's, which export the same functions), its team
// is used: one parallel region per call, with barriers of our own. The caller passes pointers to the functions; this library
// does not link to OpenMP.
//
// Without a runtime, and in a forked child (whose workers no longer exist, unknown to the runtime), a pool of our own is used;
// calls from several threads run one after another.
#include "team.h"

#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <climits>
#include <mutex>
#include <system_error>
#include <thread>

namespace qk {
namespace {

constexpr int kLooks = 1000;  // iterations before sleeping: ten to forty microseconds

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*Number)();
std::atomic<Parallel> parallel{nullptr};
std::atomic<Number> region_size{nullptr}, region_index{nullptr};

struct Job {
  TeamBody body;
  void* argument;
  Barrier barrier;
};

void run_in_region(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  // The runtime may have started fewer threads than requested.
  const Member me{region_index.load(std::memory_order_relaxed)(), region_size.load(std::memory_order_relaxed)(), &job.barrier};
  job.body(me, job.argument);
}

// A pool of our own threads.
class Pool {
 public:
  void run(int32_t threads, Job& job) {
    std::lock_guard<std::mutex> turn(turn_);
    while (workers_ < threads - 1 && start(workers_ + 1)) ++workers_;
    job_ = &job;
    count_ = workers_ + 1 < threads ? workers_ + 1 : threads;
    busy_.store(workers_, std::memory_order_relaxed);  // idle workers report too, so that none reads an old job later
    const uint32_t before = done_.now();
    called_.advance();
    job.body(Member{0, count_, &job.barrier}, job.argument);
    if (workers_) done_.wait(before);
  }

 private:
  bool start(int32_t index) {
    const uint32_t seen = called_.now();
    try {
      std::thread([this, index, seen] { work(index, seen); }).detach();
    } catch (const std::system_error&) {
      return false;  // continue with the threads that could be started
    }
    return true;
  }

  void work(int32_t index, uint32_t seen) {
    for (;; ++seen) {  // the next call cannot start before this one is reported
      called_.wait(seen);
      if (index < count_) job_->body(Member{index, count_, &job_->barrier}, job_->argument);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.advance();
    }
  }

  std::mutex turn_;
  Job* job_ = nullptr;
  int32_t count_ = 0, workers_ = 0;
  std::atomic<int32_t> busy_{0};
  Signal called_, done_;
};

std::atomic<Pool*> pool{nullptr};

Pool& own_pool() {  // never destroyed: workers may outlive main
  Pool* found = pool.load(std::memory_order_acquire);
  if (!found) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

void forget_threads() {
  parallel.store(nullptr);
  pool.store(nullptr);
}

const int at_fork = pthread_atfork(nullptr, nullptr, forget_threads);

}  // namespace

void Signal::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
#if defined(__linux__)
  if (sleepers_.load(std::memory_order_seq_cst)) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

void Signal::wait(uint32_t old) {
  for (int looks = 0; looks < kLooks; ++looks, relax())
    if (now() != old) return;
#if defined(__linux__)
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old)
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);  // returns immediately if the value has changed
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
#else
  while (now() == old) sched_yield();
#endif
}

void Barrier::wait(int32_t members) {
  const uint32_t round = round_.now();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.advance();
  } else {
    round_.wait(round);
  }
}

void run_team(int32_t threads, TeamBody body, void* argument) {
  Job job{body, argument, {}};
  if (threads <= 1) {
    body(Member{0, 1, &job.barrier}, argument);
  } else if (Parallel region = parallel.load(std::memory_order_relaxed)) {
    region(run_in_region, &job, static_cast<unsigned>(threads), 0);
  } else {
    own_pool().run(threads, job);
  }
}

}  // namespace qk

// Use the OpenMP team of these functions (GOMP_parallel, omp_get_num_threads, omp_get_thread_num); null for our own pool.
extern "C" __attribute__((visibility("default"))) void qk_use_openmp(void* gomp_parallel, void* num_threads, void* thread_num) {
  qk::region_size.store(reinterpret_cast<qk::Number>(num_threads));
  qk::region_index.store(reinterpret_cast<qk::Number>(thread_num));
  qk::parallel.store(num_threads && thread_num ? reinterpret_cast<qk::Parallel>(gomp_parallel) : nullptr);
}

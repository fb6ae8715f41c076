// Where the threads come from.
//
// torch's OpenMP workers spin for milliseconds after every parallel op. A second pool fights them for the cores: on two
// cores, a decode step of 210 matmuls between torch ops was slower with a private spinning pool than on one thread. So where
// the process has an OpenMP runtime (libgomp, or LLVM's and Intel's, which export the same entries) its team is borrowed: one
// region per call, with barriers of our own inside. The entries are handed over by the caller; this library links to no
// OpenMP.
//
// Without a runtime, and in a forked child (whose workers are gone, which the runtime does not know), a pool of our own
// stands in. Its workers look for the next job for a while and then sleep; calls from several threads take turns.
#include "team.h"

#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <thread>

namespace qk {
namespace {

constexpr int kSpins = 4000;  // looks before giving the core away: some ten microseconds

// Come back when `done()`: at first by looking again, then by letting others run in between.
template <typename Done>
void spin(Done done) {
  for (int looks = 0; !done(); ++looks) {
    if (looks >= kSpins) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
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
  // The runtime may have started fewer threads than were asked for.
  const Member me{region_index.load(std::memory_order_relaxed)(), region_size.load(std::memory_order_relaxed)(), &job.barrier};
  job.body(me, job.argument);
}

// Threads of our own.
class Pool {
 public:
  void run(int32_t threads, Job& job) {
    std::lock_guard<std::mutex> turn(turn_);
    while (workers_ < threads - 1 && start(workers_ + 1)) ++workers_;
    const int32_t count = workers_ + 1 < threads ? workers_ + 1 : threads;
    job_ = &job;
    count_ = count;
    busy_.store(workers_, std::memory_order_relaxed);  // idle ones report as well: no one may look at an old job later
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1, std::memory_order_release);
    }
    called_.notify_all();
    job.body(Member{0, count, &job.barrier}, job.argument);
    spin([this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  bool start(int32_t index) {
    const uint32_t seen = round_.load(std::memory_order_relaxed);
    try {
      std::thread([this, index, seen] { work(index, seen); }).detach();
    } catch (const std::system_error&) {
      return false;  // as many as there are will do
    }
    return true;
  }

  void work(int32_t index, uint32_t seen) {
    for (;;) {
      for (int looks = 0; looks < kSpins && round_.load(std::memory_order_acquire) == seen; ++looks) sched_yield();
      if (round_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        called_.wait(lock, [this, seen] { return round_.load(std::memory_order_relaxed) != seen; });
      }
      ++seen;  // the next round cannot begin before this one is reported
      if (index < count_) job_->body(Member{index, count_, &job_->barrier}, job_->argument);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable called_;
  Job* job_ = nullptr;
  int32_t count_ = 0, workers_ = 0;
  std::atomic<int32_t> busy_{0};
  std::atomic<uint32_t> round_{0};
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

void Barrier::wait(int32_t members) {
  const uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  spin([this, round] { return round_.load(std::memory_order_acquire) != round; });
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

// Borrow the OpenMP team behind these entries (GOMP_parallel, omp_get_num_threads, omp_get_thread_num); null for our own pool.
extern "C" __attribute__((visibility("default"))) void qk_use_openmp(void* gomp_parallel, void* num_threads, void* thread_num) {
  qk::region_size.store(reinterpret_cast<qk::Number>(num_threads));
  qk::region_index.store(reinterpret_cast<qk::Number>(thread_num));
  qk::parallel.store(num_threads && thread_num ? reinterpret_cast<qk::Parallel>(gomp_parallel) : nullptr);
}

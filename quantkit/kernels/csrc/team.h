// A team of threads that run one function, and a barrier for them.
#pragma once
#include <atomic>
#include <cstdint>

namespace qk {

// A number whose change threads can wait for: they spin for some microseconds and then sleep. Sleeping matters on a busy
// machine: the system moves a suspended thread to a core that becomes idle, not to one whose thread spins or yields.
class Signal {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  void advance();              // add one, and wake sleeping threads
  void wait(uint32_t old);     // until the value is no longer `old`

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Members wait for each other.
class Barrier {
 public:
  void wait(int32_t members);

 private:
  alignas(64) std::atomic<int32_t> arrived_{0};
  Signal round_;
};

struct Member {
  int32_t index, count;  // 0 <= index < count; the caller is 0
  Barrier* barrier;
  void wait() const {
    if (count > 1) barrier->wait(count);
  }
};

typedef void (*TeamBody)(const Member& me, void* job);

// Run body on up to `threads` members at the same time and return when all have finished. Their number is fixed before any
// starts.
void run_team(int32_t threads, TeamBody body, void* job);

// A member's share [begin, end) of [0, total), split evenly in multiples of `unit`.
inline void share(const Member& me, int64_t total, int64_t unit, int64_t* begin, int64_t* end) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t first = units * me.index / me.count * unit, last = units * (me.index + 1) / me.count * unit;
  *begin = first < total ? first : total;
  *end = last < total ? last : total;
}

}  // namespace qk

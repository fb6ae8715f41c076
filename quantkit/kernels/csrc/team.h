// A team of threads that runs one body, and the barrier its members meet at.
#pragma once
#include <atomic>
#include <cstdint>

namespace qk {

// A number that threads wait on: looking at it for some microseconds, then asleep. Sleeping matters on a busy machine: the
// system moves a thread that it has put aside to a core that falls idle, not to one that spins or yields.
class Signal {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  void advance();              // by one, and wake who sleeps
  void wait(uint32_t old);     // until it is no longer `old`

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// Members wait here for each other.
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

// Run body on up to `threads` members at once and return when all are done. How many they are is settled before any starts.
void run_team(int32_t threads, TeamBody body, void* job);

// A member's share [begin, end) of [0, total), split evenly in multiples of `unit`.
inline void share(const Member& me, int64_t total, int64_t unit, int64_t* begin, int64_t* end) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t first = units * me.index / me.count * unit, last = units * (me.index + 1) / me.count * unit;
  *begin = first < total ? first : total;
  *end = last < total ? last : total;
}

}  // namespace qk

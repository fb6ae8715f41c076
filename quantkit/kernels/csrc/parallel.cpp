// A loop that is distributed over a team. Ranges are claimed one by one, so a suspended thread delays only its current range.
#include "parallel.h"

#include <atomic>

#include "team.h"

namespace {

struct Loop {
  qk::RangeBody body;
  const void* job;
  int64_t total, chunk;
  std::atomic<int64_t> next{0};
};

void run(const qk::Member&, void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  for (;;) {
    int64_t begin = loop.next.fetch_add(loop.chunk, std::memory_order_relaxed);
    if (begin >= loop.total) return;
    int64_t end = begin + loop.chunk;
    loop.body(loop.job, begin, end < loop.total ? end : loop.total);
  }
}

}  // namespace

namespace qk {

void parallel_for(int64_t total, int64_t chunk, int32_t threads, RangeBody body, const void* job) {
  if (threads <= 1 || total <= chunk) {
    if (total > 0) body(job, 0, total);
    return;
  }
  Loop loop{body, job, total, chunk};
  run_team(threads, run, &loop);
}

}  // namespace qk

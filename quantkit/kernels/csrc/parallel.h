// Splitting a loop over threads.
#pragma once
#include <cstdint>

namespace qk {

typedef void (*RangeBody)(const void* job, int64_t begin, int64_t end);

// Call body(job, begin, end) for consecutive ranges of at most `chunk` that cover [0, total), on up to `threads` threads.
// Which thread runs which range is not fixed, so a body must not depend on it.
void parallel_for(int64_t total, int64_t chunk, int32_t threads, RangeBody body, const void* job);

}  // namespace qk

// The emulated machine's knobs, for tests.
#include "host.h"

extern "C" void qk_host_shared_limit(long bytes) { qk::shared_limit = size_t(bytes); }
extern "C" void qk_host_last_block_first(int yes) { qk::last_block_first = yes; }

// Attention of a prompt: neighbouring tokens of one sequence, so many at a time that they share what is read from the pages.
//
// - A tile is a run of tokens of one sequence. A warp's 16 rows (attend.cuh) are as many tokens as fit times the query heads that share
//   a key head (8 heads: 2 tokens), the four warps of a block have four such runs, and all read the same 16 keys and values, of
//   which each warp copies a quarter into shared memory.
// - Every row has its own last token (and first one, under a window), so a mask is enough for causality. A warp skips tokens that
//   none of its rows can see.
// - A tile is one block: nothing is split, sums have one order whatever else is in the batch.
#include "attend.cuh"

namespace qk {

template <class T, int D, int kKind> __global__ void __launch_bounds__(kAttendWarps* kWarp, 2) attend_prompt(Attend a) {
  using W = Attention<T, D, kKind, 2>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows, kv_head = blockIdx.y / packs;
  const int first_head = kv_head * shared_by + blockIdx.y % packs * kHeadRows;
  const int heads = min(kHeadRows, (kv_head + 1) * shared_by - first_head);
  const int together = min(kHeadRows, shared_by), tokens = kHeadRows / together;  // of a warp
  const int first = a.tiles[2 * blockIdx.x], count = a.tiles[2 * blockIdx.x + 1], begins = a.positions[first];
  if (begins < 0) return;  // its rows are no tile's, and stay as they are
  // Token (counted from the tile's first) and head of one of the warp's rows; the token is negative if there is none.
  const auto token_of = [&](int row) {
    const int token = warp * tokens + row / together;
    return row < tokens * together && token < count && row % together < heads ? token : -1;
  };
  W w{a, static_cast<char*>(shared_memory()), a.table + int64_t(a.slots[first]) * a.stride, lane, kv_head, begins + count - 1};
  for (int r = 0; r < 2; ++r) {
    const int token = token_of(lane / 4 + 8 * r);
    w.position[r] = token < 0 ? -1 : begins + token;
    w.start[r] = a.window > 0 ? max(0, w.position[r] + 1 - a.window) : 0;
  }
  w.begin([&](int row) {
    const int token = token_of(row);
    return token < 0 ? int64_t(-1) : int64_t(first + token) * a.heads + first_head + row % together;
  });

  // The warp's own tokens see the blocks from `near` to `far`; the block of threads reads those from `from` on.
  const int earliest = a.window > 0 ? max(0, begins + 1 - a.window) : 0, from = earliest / kTokens, end = w.last / kTokens + 1;
  const int own = begins + warp * tokens, near = (a.window > 0 ? max(0, own + 1 - a.window) : 0) / kTokens;
  const int far = warp * tokens < count ? min(own + tokens - 1, w.last) / kTokens : -1;
  for (int s = 0; s < kAttendStages - 1; ++s) {
    if (from + s < end) w.template fetch<kAttendWarps>(from + s, s, warp);
    copies_commit();
  }
  for (int block = from; block < end; ++block) {
    copies_wait<kAttendStages - 2>();
    __syncthreads();  // the copies of all are here, and nobody reads any more from where the next ones go
    const int next = block + kAttendStages - 1;
    if (next < end) w.template fetch<kAttendWarps>(next, (next - from) % kAttendStages, warp);
    copies_commit();
    if (block >= near && block <= far) w.read(block, (block - from) % kAttendStages);
  }
  copies_wait<0>();
  w.end();

  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r, token = token_of(row);
    if (token < 0) continue;
    T* out = static_cast<T*>(a.out) + (int64_t(first + token) * a.heads + first_head + row % together) * D;
#pragma unroll
    for (int i = 0; i < 2; ++i)  // column c of product d is channel c * D / 8 + d
#pragma unroll
      for (int d = 0; d < D / 8; d += 2)
        *reinterpret_cast<uint32_t*>(out + (lane % 4 * 2 + i) * (D / 8) + d) =
            pack<T>(w.out[d][2 * r + i] / w.total[r], w.out[d + 1][2 * r + i] / w.total[r]);
  }
}

template <class T, int D, int kKind> struct Prompt {
  static int launch(const Attend& a, void* stream) {
    const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows;
    const dim3 grid(unsigned(a.count), unsigned(a.kv_heads * packs));
    return qk::launch(attend_prompt<T, D, kKind>, grid, kAttendWarps * kWarp, size_t(kAttendStages) * KvStage<D, kKind>::size, stream, a);
  }
};

}  // namespace qk

QK_API int qk_attend_prompt(const qk::Attend* a, void* stream) { return a->count ? qk::pick<qk::Prompt>(*a, stream) : 0; }

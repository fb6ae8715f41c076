// Attention of decoded tokens, each of its own sequence: read the pages once, at memory's speed.
//
// - The query heads that share a key head (up to 16) are a warp's 16 rows (attend.cuh). A warp takes 16 tokens at a time; four warps
//   per block take four runs of tokens, and blocks split the sequence (Dao et al. 2023, flash decoding). What a lane copies only
//   that lane reads back, so warps do not wait for each other.
// - Parts are merged in their order by the block that arrives last: the same bits every time.
#include "attend.cuh"

namespace qk {

// Add up `count` parts of (16, D + 2) numbers (sums, then maximum and total of a head) in their order: element `d` of `head`.
// Parts of other blocks are in global memory and read as `fresh`, those of this block's warps in shared memory, where that faults.
template <int D, bool kShared>
__device__ inline void merge(const float* parts, int count, int head, int d, float& value, float& most, float& total) {
  constexpr int kRow = D + 2;
  auto read = [](const float* x) {
    if constexpr (kShared) return *x;
    else return fresh(x);
  };
  most = kNegativeInfinity, value = 0, total = 0;
  for (int i = 0; i < count; ++i) most = fmaxf(most, read(parts + (i * kHeadRows + head) * kRow + D));
  for (int i = 0; i < count; ++i) {
    const float* part = parts + (i * kHeadRows + head) * kRow;
    const float fade = expf(read(part + D) - most);
    value += fade * read(part + d), total += fade * read(part + D + 1);
  }
}

template <class W> __device__ inline void run(W& w, int begin, int end) {
  for (int s = 0; s < kAttendStages - 1; ++s) {
    if (begin + s < end) w.template fetch<1>(begin + s, s, 0);
    copies_commit();
  }
  for (int block = begin; block < end; ++block) {
    copies_wait<kAttendStages - 2>();
    const int next = block + kAttendStages - 1;
    if (next < end) w.template fetch<1>(next, (next - begin) % kAttendStages, 0);
    copies_commit();
    w.read(block, (block - begin) % kAttendStages);
  }
  copies_wait<0>();
  w.end();
}

template <class T, int D, int kKind> __global__ void __launch_bounds__(kAttendWarps* kWarp) attend(Attend a) {
  using W = Attention<T, D, kKind, 1>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, row = blockIdx.z;
  const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows, kv_head = blockIdx.y / packs;
  const int first = kv_head * shared_by + blockIdx.y % packs * kHeadRows;
  const int heads = min(kHeadRows, (kv_head + 1) * shared_by - first), position = a.positions[row];
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.heads + first) * D;
  if (position < 0) {  // a row that only fills a batch up
    if (blockIdx.x == 0)
      for (int at = threadIdx.x; at < heads * D; at += blockDim.x) out[at] = from_float<T>(0.0f);
    return;
  }
  const int start = a.window > 0 ? max(0, position + 1 - a.window) : 0;
  W w{a, static_cast<char*>(shared_memory()) + warp * kAttendStages * W::S::size,
      a.table + int64_t(a.slots[row]) * a.stride, lane, kv_head, position, {position}, {start}};
  w.begin([&](int head) { return head < heads ? int64_t(row) * a.heads + first + head : int64_t(-1); });
  const int from = start / kTokens, blocks = position / kTokens + 1 - from;
  const int part = blockIdx.x * kAttendWarps + warp, parts = a.splits * kAttendWarps;
  run(w, from + int(int64_t(blocks) * part / parts), from + int(int64_t(blocks) * (part + 1) / parts));

  constexpr int kRow = D + 2;
  __syncthreads();
  float* sums = static_cast<float*>(shared_memory());
  float* own = sums + warp * kHeadRows * kRow;
#pragma unroll
  for (int d = 0; d < D / 8; ++d)
    for (int i = 0; i < 4; ++i)  // column c of product d is channel c * D / 8 + d
      own[(lane / 4 + i / 2 * 8) * kRow + (lane % 4 * 2 + i % 2) * (D / 8) + d] = w.out[d][i];
  if (lane % 4 == 0)
    for (int r = 0; r < 2; ++r) own[(lane / 4 + 8 * r) * kRow + D] = w.most[r], own[(lane / 4 + 8 * r) * kRow + D + 1] = w.total[r];
  __syncthreads();

  const int64_t item = int64_t(row) * gridDim.y + blockIdx.y;
  float* partial = a.partial + item * a.splits * kHeadRows * kRow;
  for (int at = threadIdx.x; at < heads * D; at += blockDim.x) {
    float value, most, total;
    merge<D, true>(sums, kAttendWarps, at / D, at % D, value, most, total);
    if (a.splits == 1) {
      out[at] = from_float<T>(value / total);
      continue;
    }
    float* to = partial + (blockIdx.x * kHeadRows + at / D) * kRow;
    to[at % D] = value;
    if (at % D == 0) to[D] = most, to[D + 1] = total;
  }
  if (a.splits == 1) return;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + item, 1) == a.splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int at = threadIdx.x; at < heads * D; at += blockDim.x) {
    float value, most, total;
    merge<D, false>(partial, a.splits, at / D, at % D, value, most, total);
    out[at] = from_float<T>(value / total);
  }
  if (threadIdx.x == 0) a.arrived[item] = 0;
}

template <class T, int D, int kKind> struct Decoded {
  static int launch(const Attend& a, void* stream) {
    const int shared_by = a.heads / a.kv_heads, packs = (shared_by + kHeadRows - 1) / kHeadRows;
    constexpr size_t stages = size_t(kAttendWarps) * kAttendStages * KvStage<D, kKind>::size;
    constexpr size_t sums = sizeof(float) * kAttendWarps * kHeadRows * (D + 2);
    const dim3 grid(unsigned(a.splits), unsigned(a.kv_heads * packs), unsigned(a.rows));
    return qk::launch(attend<T, D, kKind>, grid, kAttendWarps * kWarp, stages > sums ? stages : sums, stream, a);
  }
};

}  // namespace qk

QK_API int qk_attend(const qk::Attend* a, void* stream) { return a->rows ? qk::pick<qk::Decoded>(*a, stream) : 0; }

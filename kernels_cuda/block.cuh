// What a block of up to 1024 threads finds out together.
#pragma once
#include "device.cuh"

namespace qk {

// Combine a value of every thread, in an order that depends on the number of threads alone, for every thread. `none` changes
// nothing it is combined with; `shared` has room for a value per warp.
template <class V, class Combine> __device__ inline V block_reduce(V x, V none, V* shared, Combine combine) {
  for (int mask = 16; mask; mask /= 2) x = combine(x, exchange(x, mask));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  x = lane < blockDim.x / kWarp ? shared[lane] : none;
  for (int mask = 16; mask; mask /= 2) x = combine(x, exchange(x, mask));
  return x;
}
template <class V> __device__ inline V block_sum(V x, V* shared) {
  return block_reduce(x, V(0), shared, [](V a, V b) { return a + b; });
}

// The largest value and where it stands: the first of equals. What is not a number counts as infinite, so that it shows.
struct Best { float value; int index; };
__device__ inline Best candidate(float value, int index) { return {value < INFINITY ? value : INFINITY, index}; }
__device__ inline Best no_best() { return {-INFINITY, 0x7fffffff}; }
__device__ inline Best exchange(Best x, int mask) { return {exchange(x.value, mask), exchange(x.index, mask)}; }
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

}  // namespace qk

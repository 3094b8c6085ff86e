// Sums over the threads of a warp or a block in a fixed order, and how kernels are started. This header and those that
// hold kernels need no torch and no CUDA: tests/native compiles them for the host, with threads as coroutines.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define FASTLORA_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace fastlora::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of the values of the threads before this one; total becomes that of all kThreads, for every thread.
template <int kThreads>
__device__ __forceinline__ int64_t block_exclusive_scan(int64_t value, int64_t& total) {
  __shared__ int64_t warp_sums[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) {
    if (i < warp) before += warp_sums[i];
    total += warp_sums[i];
  }
  return before + sum - value;
}

// The sum over all kThreads, for thread 0.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) sum += warp_sums[i];
  return sum;
}

}  // namespace fastlora::cuda

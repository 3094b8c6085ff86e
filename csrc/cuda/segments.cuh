// A stable counting sort of rows by adapter. Every warp owns one chunk of rows and one column of the counts, so nothing
// is added atomically and the order of rows never depends on timing.
#pragma once
#include <algorithm>

#include "cuda/block.cuh"

namespace fastlora::cuda {

constexpr int kSortThreads = 256;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int64_t kMinChunk = 256;
constexpr int64_t kMaxChunks = 4096;  // bounds the counts at (adapters + 1) * 32 KiB

// chunk: rows per warp, a multiple of 32; keys 0..adapters - 1 are adapters, key `adapters` is base only.
struct SortProblem {
  int64_t rows, adapters, chunk, chunks;
};

inline SortProblem sort_problem(int64_t rows, int64_t adapters) {
  const int64_t even = (rows + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk = std::max(kMinChunk, (even + kWarp - 1) / kWarp * kWarp);
  return {rows, adapters, chunk, (rows + chunk - 1) / chunk};
}

// Nothing is read back from the device, so an id out of range counts as base only.
__device__ __forceinline__ int64_t key_of(int64_t id, int64_t adapters) {
  return id >= 0 && id < adapters ? id : adapters;
}

// Visits the warp's chunk 32 rows at a time: f(row, inside, key, lanes with the same key, how many of them are before).
template <class F>
__device__ __forceinline__ void for_each_row(const int64_t* ids, const SortProblem& p, int64_t chunk, const F& f) {
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = chunk * p.chunk, end = begin + p.chunk < p.rows ? begin + p.chunk : p.rows;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int64_t row = first + lane;
    const bool inside = row < end;
    const int64_t key = inside ? key_of(ids[row], p.adapters) : -1;
    const unsigned peers = __match_any_sync(kAllLanes, static_cast<unsigned long long>(key));
    f(row, inside, key, __popc(peers), __popc(peers & ((1u << lane) - 1)));
    __syncwarp();  // the next 32 rows read what the lanes wrote
  }
}

// counts[key, chunk] (zero before) = rows of the chunk with that key
__global__ void __launch_bounds__(kSortThreads) count_kernel(const int64_t* ids, int64_t* counts, SortProblem p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kSortWarps + threadIdx.x / kWarp;
  if (chunk >= p.chunks) return;
  for_each_row(ids, p, chunk, [&](int64_t, bool inside, int64_t key, int same, int before) {
    if (inside && before == 0) counts[key * p.chunks + chunk] += same;
  });
}

// One block per key: counts[key, chunk] becomes the number of its rows in the chunks before; totals[key] all of them.
__global__ void __launch_bounds__(kSortThreads) scan_chunks_kernel(int64_t* counts, int64_t* totals, SortProblem p) {
  int64_t* row = counts + blockIdx.x * p.chunks;
  int64_t carry = 0;
  for (int64_t first = 0; first < p.chunks; first += kSortThreads) {
    const int64_t chunk = first + threadIdx.x;
    int64_t total;
    const int64_t value = chunk < p.chunks ? row[chunk] : 0;
    const int64_t before = block_exclusive_scan<kSortThreads>(value, total);
    if (chunk < p.chunks) row[chunk] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = carry;
}

// One block: starts[key] = rows with a smaller key; ranges[g] = begin and end of adapter g, (0, 0) without rows
__global__ void __launch_bounds__(kSortThreads)
    scan_keys_kernel(const int64_t* totals, int64_t* starts, int64_t* ranges, int64_t adapters) {
  int64_t carry = 0;
  for (int64_t first = 0; first <= adapters; first += kSortThreads) {
    const int64_t key = first + threadIdx.x;
    int64_t total;
    const int64_t count = key <= adapters ? totals[key] : 0;
    const int64_t begin = carry + block_exclusive_scan<kSortThreads>(count, total);
    if (key <= adapters) starts[key] = begin;
    if (key < adapters) {
      ranges[2 * key] = count ? begin : 0;
      ranges[2 * key + 1] = count ? begin + count : 0;
    }
    carry += total;
  }
}

// order[position of the row] = row; counts is used as the warp's cursor
__global__ void __launch_bounds__(kSortThreads)
    scatter_kernel(const int64_t* ids, int64_t* counts, const int64_t* starts, int64_t* order, SortProblem p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kSortWarps + threadIdx.x / kWarp;
  if (chunk >= p.chunks) return;
  for_each_row(ids, p, chunk, [&](int64_t row, bool inside, int64_t key, int same, int before) {
    int64_t* cursor = counts + key * p.chunks + chunk;
    const int64_t used = inside ? *cursor : 0;
    __syncwarp();
    if (inside) order[starts[key] + used + before] = row;
    if (inside && before == 0) *cursor = used + same;
  });
}

// One block: ends[g] = tiles of the adapters up to and including g
__global__ void __launch_bounds__(kSortThreads)
    count_tiles_kernel(const int64_t* ranges, int64_t* ends, int64_t adapters, int64_t block) {
  int64_t carry = 0;
  for (int64_t first = 0; first < adapters; first += kSortThreads) {
    const int64_t g = first + threadIdx.x;
    int64_t total;
    const int64_t rows = g < adapters ? ranges[2 * g + 1] - ranges[2 * g] : 0;
    const int64_t tiles = rows / block + (rows % block != 0);
    const int64_t before = block_exclusive_scan<kSortThreads>(tiles, total);
    if (g < adapters) ends[g] = carry + before + tiles;
    carry += total;
  }
}

// tiles[t] = (adapter, first position), or (-1, 0) after the last tile
__global__ void __launch_bounds__(kSortThreads)
    fill_tiles_kernel(const int64_t* ranges, const int64_t* ends, int64_t* tiles, int64_t adapters, int64_t block,
                      int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSortThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x; t < count; t += stride) {
    int64_t low = 0, high = adapters;  // the first adapter whose tiles end after t
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] <= t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool used = low < adapters;
    const int64_t before = used && low > 0 ? ends[low - 1] : 0;
    tiles[2 * t] = used ? low : -1;
    tiles[2 * t + 1] = used ? ranges[2 * low] + (t - before) * block : 0;
  }
}

// Scratch: counts [adapters + 1, chunks], totals and starts [adapters + 1]. Results: order [rows], ranges [adapters,
// 2].
inline cudaError_t sort_rows(const int64_t* ids, int64_t* counts, int64_t* totals, int64_t* starts, int64_t* order,
                             int64_t* ranges, const SortProblem& p, cudaStream_t stream) {
  const int64_t keys = p.adapters + 1, blocks = (p.chunks + kSortWarps - 1) / kSortWarps;
  const size_t bytes = sizeof(int64_t) * static_cast<size_t>(keys * p.chunks);
  if (p.rows > 0) {
    const cudaError_t error = cudaMemsetAsync(counts, 0, bytes, stream);
    if (error != cudaSuccess) return error;
    FASTLORA_LAUNCH(count_kernel, blocks, kSortThreads, stream, ids, counts, p);
  }
  FASTLORA_LAUNCH(scan_chunks_kernel, keys, kSortThreads, stream, counts, totals, p);
  FASTLORA_LAUNCH(scan_keys_kernel, 1, kSortThreads, stream, totals, starts, ranges, p.adapters);
  if (p.rows > 0) FASTLORA_LAUNCH(scatter_kernel, blocks, kSortThreads, stream, ids, counts, starts, order, p);
  return cudaGetLastError();
}

// Scratch: ends [adapters]. Result: tiles [count, 2], count = ceil(rows / block) + adapters > 0.
inline cudaError_t write_tiles(const int64_t* ranges, int64_t* ends, int64_t* tiles, int64_t adapters, int64_t block,
                               int64_t count, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((count + kSortThreads - 1) / kSortThreads, 4096);
  FASTLORA_LAUNCH(count_tiles_kernel, 1, kSortThreads, stream, ranges, ends, adapters, block);
  FASTLORA_LAUNCH(fill_tiles_kernel, blocks, kSortThreads, stream, ranges, ends, tiles, adapters, block, count);
  return cudaGetLastError();
}

}  // namespace fastlora::cuda

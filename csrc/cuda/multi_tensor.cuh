// Squared norms, variances, copies to another rank and probe signs of all layers, each in a fixed number of launches.
#pragma once
#include "cuda/block.cuh"
#include "cuda/numbers.cuh"
#include "cuda/table.cuh"

namespace fastlora::cuda {

constexpr int kNormThreads = 256;
constexpr int64_t kNormChunk = 8192;  // elements of a block
constexpr int kCopyThreads = 256;
constexpr int kCopyBlocks = 8;  // for each matrix
constexpr int kSignThreads = 256;
constexpr int kSignsPerCounter = 128;

struct NormEntry {
  const void* data;
  int64_t count;
  Number type;
  int64_t end;  // blocks up to and with this tensor's
};

// One run of columns of [sum y; sum y^2 | rows], float64.
struct VarianceEntry {
  const double* sums;
  int64_t columns, first, count;  // of y; of the run
};

struct CopyEntry {
  void* to;
  const void* from;
  int64_t ldt, lds, rows, columns, kept_rows, kept_columns;
  int32_t item;  // bytes of an element: 2, 4 or 8
};

struct SignCounter {
  const int64_t* seed;
  uint32_t step, first, tag;
};

// partial[block] = the squares of one chunk of a tensor, summed in float64 in a fixed order
__global__ void __launch_bounds__(kNormThreads)
    norms_kernel(const __grid_constant__ Table<NormEntry> table, int64_t tensors, double* partial) {
  const int64_t t = entry_of(blockIdx.x, tensors, [&](int64_t i) { return table.entries[i].end; });
  const NormEntry& e = table.entries[t];
  const int64_t begin = (blockIdx.x - (t > 0 ? table.entries[t - 1].end : 0)) * kNormChunk;
  const int64_t end = e.count - begin < kNormChunk ? e.count : begin + kNormChunk;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kNormThreads) {
    const double value = load_double(e.data, e.type, i);
    sum += value * value;
  }
  sum = block_sum<kNormThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out[tensor] = the sum of its chunks in their order: a thread takes a tensor
__global__ void __launch_bounds__(kNormThreads) sum_norms_kernel(const __grid_constant__ Table<NormEntry> table,
                                                                 int64_t tensors, const double* partial, double* out) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  if (t >= tensors) return;
  double sum = 0.0;
  for (int64_t i = t > 0 ? table.entries[t - 1].end : 0; i < table.entries[t].end; ++i) sum += partial[i];
  out[t] = sum;
}

// One block per run: the sum over its columns of max(0, E y^2 - (E y)^2)
__global__ void __launch_bounds__(kNormThreads)
    variances_kernel(const __grid_constant__ Table<VarianceEntry> table, double* out) {
  const VarianceEntry& e = table.entries[blockIdx.x];
  const double* squares = e.sums + e.columns + 1;
  const double rows = e.sums[e.columns];
  double sum = 0.0;
  for (int64_t n = e.first + threadIdx.x; n < e.first + e.count; n += kNormThreads) {
    const double mean = e.sums[n] / rows, variance = squares[n] / rows - mean * mean;
    sum += variance < 0.0 ? 0.0 : variance;  // NaN stays
  }
  sum = block_sum<kNormThreads>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class Bits>
__device__ __forceinline__ void copy_matrix(const CopyEntry& e, int64_t part) {
  Bits* to = static_cast<Bits*>(e.to);
  const Bits* from = static_cast<const Bits*>(e.from);
  const int64_t count = e.rows * e.columns;
  for (int64_t i = part * kCopyThreads + threadIdx.x; i < count; i += kCopyBlocks * kCopyThreads) {
    const int64_t row = i / e.columns, column = i % e.columns;
    const bool kept = row < e.kept_rows && column < e.kept_columns;
    to[row * e.ldt + column] = kept ? from[row * e.lds + column] : Bits{0};
  }
}

__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const __grid_constant__ Table<CopyEntry> table) {
  const CopyEntry& e = table.entries[blockIdx.x / kCopyBlocks];
  const int64_t part = blockIdx.x % kCopyBlocks;
  if (e.item == 2) {
    copy_matrix<uint16_t>(e, part);
  } else if (e.item == 4) {
    copy_matrix<uint32_t>(e, part);
  } else {
    copy_matrix<uint64_t>(e, part);
  }
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
__device__ __forceinline__ void philox(uint64_t seed, uint32_t (&words)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * words[0], right = uint64_t{0xCD9E8D57u} * words[2];
    words[0] = static_cast<uint32_t>(right >> 32) ^ words[1] ^ k0;
    words[2] = static_cast<uint32_t>(left >> 32) ^ words[3] ^ k1;
    words[1] = static_cast<uint32_t>(right);
    words[3] = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Each lane draws its own counter's 128 bits; then the warp writes the counters one by one, 32 signs side by side.
__global__ void __launch_bounds__(kSignThreads)
    signs_kernel(const __grid_constant__ Table<int64_t> ends, int64_t groups, int64_t first_group, SignCounter c,
                 float* out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t total = ends.entries[groups - 1];
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kSignThreads + threadIdx.x;
  const int64_t group = entry_of(mine, groups, [&](int64_t i) { return ends.entries[i]; });
  const int64_t number = mine - (group > 0 ? ends.entries[group - 1] : 0);
  uint32_t words[4] = {static_cast<uint32_t>(number), c.step, c.first + static_cast<uint32_t>(first_group + group),
                       c.tag};
  philox(static_cast<uint64_t>(*c.seed), words);
  for (int i = 0; i < kWarp; ++i) {
    const int64_t counter = mine - lane + i;
    if (counter >= total) break;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t bits = __shfl_sync(kAllLanes, words[w], i);
      out[counter * kSignsPerCounter + w * kWarp + lane] = bits >> lane & 1u ? -1.0f : 1.0f;
    }
  }
}

inline int64_t norm_blocks(int64_t count) { return std::max<int64_t>((count + kNormChunk - 1) / kNormChunk, 1); }

// partial: scratch, one for each of the tensors' blocks. Where all tensors of a table are one chunk, one launch does.
inline cudaError_t write_norms(const std::vector<NormEntry>& entries, double* partial, double* out,
                               cudaStream_t stream) {
  for_each_table(entries, [&](Table<NormEntry>& table, int64_t count, int64_t first) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) table.entries[i].end = blocks += norm_blocks(table.entries[i].count);
    double* sums = blocks == count ? out + first : partial;
    FASTLORA_LAUNCH(norms_kernel, blocks, kNormThreads, stream, table, count, sums);
    if (blocks == count) return;
    const int64_t threads = (count + kNormThreads - 1) / kNormThreads;
    FASTLORA_LAUNCH(sum_norms_kernel, threads, kNormThreads, stream, table, count, partial, out + first);
    partial += blocks;
  });
  return cudaGetLastError();
}

inline cudaError_t write_variances(const std::vector<VarianceEntry>& entries, double* out, cudaStream_t stream) {
  for_each_table(entries, [&](const Table<VarianceEntry>& table, int64_t count, int64_t first) {
    FASTLORA_LAUNCH(variances_kernel, count, kNormThreads, stream, table, out + first);
  });
  return cudaGetLastError();
}

inline cudaError_t copy_all(const std::vector<CopyEntry>& entries, cudaStream_t stream) {
  for_each_table(entries, [&](const Table<CopyEntry>& table, int64_t count, int64_t) {
    FASTLORA_LAUNCH(copy_kernel, count * kCopyBlocks, kCopyThreads, stream, table);
  });
  return cudaGetLastError();
}

// counts[group] counters for each group, one after the other
inline cudaError_t write_signs(const std::vector<int64_t>& counts, const SignCounter& c, float* out,
                               cudaStream_t stream) {
  for_each_table(counts, [&](Table<int64_t>& ends, int64_t groups, int64_t first_group) {
    for (int64_t group = 1; group < groups; ++group) ends.entries[group] += ends.entries[group - 1];
    const int64_t total = ends.entries[groups - 1], blocks = (total + kSignThreads - 1) / kSignThreads;
    if (total == 0) return;
    FASTLORA_LAUNCH(signs_kernel, blocks, kSignThreads, stream, ends, groups, first_group, c, out);
    out += total * kSignsPerCounter;
  });
  return cudaGetLastError();
}

}  // namespace fastlora::cuda

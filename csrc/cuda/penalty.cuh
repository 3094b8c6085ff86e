// sum_m w_m s_m^2 ||B_m A_m||_F^2 and its gradient for the matrices of all layers, through r x r Gram matrices.
#pragma once
#include "cuda/block.cuh"
#include "cuda/numbers.cuh"
#include "cuda/table.cuh"

namespace fastlora::cuda {

constexpr int kGram = 16;  // rows and columns of a Gram matrix that a block computes at a time, one a thread
constexpr int kGramThreads = kGram * kGram;
constexpr int kGramDepth = 64;

struct PenaltyEntry {
  const void *A, *B;  // [rank, depth], [width, rank]
  void *dA, *dB;      // the same shapes, or null
  int64_t lda, ldb, ldda, lddb, depth, width, rank;
  int64_t grams;  // where A A^T and B^T B lie in the scratch memory
  double scale;
  Number type_A, type_B, type_dA, type_dB;
};

// Element (i, k) of a [rank, depth] matrix lies at i * rank_stride + k * depth_stride.
struct Operand {
  const void* data;
  Number type;
  int64_t rank_stride, depth_stride, rank, depth;
};

__device__ __forceinline__ Operand operand_A(const PenaltyEntry& e) {
  return {e.A, e.type_A, e.lda, 1, e.rank, e.depth};
}
__device__ __forceinline__ Operand operand_B(const PenaltyEntry& e) {
  return {e.B, e.type_B, 1, e.ldb, e.rank, e.width};
}

// tile[i][k] = operand[first + i, start + k]; what lies outside reads as zero. Neighbours in memory go to neighbours
// among the threads.
__device__ __forceinline__ void stage(const Operand& o, int64_t first, int64_t start, float (*tile)[kGramDepth + 1]) {
  const bool by_depth = o.depth_stride == 1;
  for (int e = threadIdx.x; e < kGram * kGramDepth; e += kGramThreads) {
    const int i = by_depth ? e / kGramDepth : e % kGram, k = by_depth ? e % kGramDepth : e / kGram;
    const bool inside = first + i < o.rank && start + k < o.depth;
    const int64_t at = (first + i) * o.rank_stride + (start + k) * o.depth_stride;
    tile[i][k] = inside ? load_number(o.data, o.type, at) : 0.0f;
  }
}

// sum_k operand[first_i + i, k] operand[first_j + j, k] for the thread i * 16 + j
__device__ __forceinline__ float gram_element(const Operand& o, int64_t first_i, int64_t first_j) {
  __shared__ float left[kGram][kGramDepth + 1], right[kGram][kGramDepth + 1];
  const int i = threadIdx.x / kGram, j = threadIdx.x % kGram;
  float sum = 0.0f;
  for (int64_t start = 0; start < o.depth; start += kGramDepth) {
    __syncthreads();
    stage(o, first_i, start, left);
    stage(o, first_j, start, right);
    __syncthreads();
#pragma unroll 16
    for (int k = 0; k < kGramDepth; ++k) sum += left[i][k] * right[j][k];
  }
  return sum;
}

// One block per matrix: values[first + m] = w_m s_m^2 sum (A A^T o B^T B)
__global__ void __launch_bounds__(kGramThreads)
    penalty_kernel(const __grid_constant__ Table<PenaltyEntry> table, const void* weights, Number weight_type,
                   int64_t first, double* values) {
  const PenaltyEntry& e = table.entries[blockIdx.x];
  double sum = 0.0;
  for (int64_t i = 0; i < e.rank; i += kGram) {
    for (int64_t j = 0; j < e.rank; j += kGram) {
      const float of_A = gram_element(operand_A(e), i, j), of_B = gram_element(operand_B(e), i, j);
      sum += static_cast<double>(of_A) * of_B;
    }
  }
  sum = block_sum<kGramThreads>(sum);
  const int64_t m = first + blockIdx.x;
  if (threadIdx.x == 0) values[m] = load_double(weights, weight_type, m) * e.scale * e.scale * sum;
}

__global__ void __launch_bounds__(kGramThreads) total_kernel(const double* values, int64_t count, float* total) {
  double sum = 0.0;
  for (int64_t m = threadIdx.x; m < count; m += kGramThreads) sum += values[m];
  sum = block_sum<kGramThreads>(sum);
  if (threadIdx.x == 0) *total = static_cast<float>(sum);
}

// gram [r, r] = coefficient * operand operand^T
__device__ __forceinline__ void write_gram(const Operand& o, float coefficient, float* gram) {
  const int row = threadIdx.x / kGram, column = threadIdx.x % kGram;
  for (int64_t i = 0; i < o.rank; i += kGram) {
    for (int64_t j = 0; j < o.rank; j += kGram) {
      const float value = gram_element(o, i, j);
      if (i + row < o.rank && j + column < o.rank) gram[(i + row) * o.rank + j + column] = coefficient * value;
    }
  }
  __syncthreads();
}

// dA [r, K] += gram A: a thread takes a column, and 8 rows at a time
__device__ __forceinline__ void add_to_dA(const PenaltyEntry& e, const float* gram) {
  constexpr int kRows = 8;
  for (int64_t k = threadIdx.x; k < e.depth; k += kGramThreads) {
    for (int64_t first = 0; first < e.rank; first += kRows) {
      const int64_t rows = e.rank - first < kRows ? e.rank - first : kRows;
      float sums[kRows] = {};
      for (int64_t q = 0; q < e.rank; ++q) {
        const float value = load_number(e.A, e.type_A, q * e.lda + k);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i < rows) sums[i] += gram[(first + i) * e.rank + q] * value;
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (first + i) * e.ldda + k;
        if (i < rows) store_number(e.dA, e.type_dA, at, load_number(e.dA, e.type_dA, at) + sums[i]);
      }
    }
  }
}

// dB [N, r] += B gram: a thread takes an element
__device__ __forceinline__ void add_to_dB(const PenaltyEntry& e, const float* gram) {
  for (int64_t element = threadIdx.x; element < e.width * e.rank; element += kGramThreads) {
    const int64_t n = element / e.rank, j = element % e.rank;
    float sum = 0.0f;
    for (int64_t q = 0; q < e.rank; ++q) {
      sum += load_number(e.B, e.type_B, n * e.ldb + q) * gram[q * e.rank + j];
    }
    const int64_t at = n * e.lddb + j;
    store_number(e.dB, e.type_dB, at, load_number(e.dB, e.type_dB, at) + sum);
  }
}

// Two blocks per matrix: dA needs B^T B alone, and dB needs A A^T alone.
__global__ void __launch_bounds__(kGramThreads)
    penalty_grad_kernel(const __grid_constant__ Table<PenaltyEntry> table, const void* weights, Number weight_type,
                        int64_t first, double weight, float* grams) {
  const PenaltyEntry& e = table.entries[blockIdx.x / 2];
  const double of_matrix = load_double(weights, weight_type, first + blockIdx.x / 2);
  const float coefficient = static_cast<float>(2.0 * weight * of_matrix * e.scale * e.scale);
  float* gram = grams + e.grams;
  if (blockIdx.x % 2 == 0) {
    if (e.dA == nullptr) return;
    write_gram(operand_B(e), coefficient, gram);
    add_to_dA(e, gram);
  } else {
    if (e.dB == nullptr) return;
    gram += e.rank * e.rank;
    write_gram(operand_A(e), coefficient, gram);
    add_to_dB(e, gram);
  }
}

// values: scratch, one for each matrix
inline cudaError_t write_penalty(const std::vector<PenaltyEntry>& entries, const void* weights, Number weight_type,
                                 double* values, float* total, cudaStream_t stream) {
  for_each_table(entries, [&](const Table<PenaltyEntry>& table, int64_t count, int64_t first) {
    FASTLORA_LAUNCH(penalty_kernel, count, kGramThreads, stream, table, weights, weight_type, first, values);
  });
  FASTLORA_LAUNCH(total_kernel, 1, kGramThreads, stream, values, static_cast<int64_t>(entries.size()), total);
  return cudaGetLastError();
}

// grams: scratch, 2 r^2 for each matrix, where `entries` say
inline cudaError_t add_penalty_grad(const std::vector<PenaltyEntry>& entries, const void* weights, Number weight_type,
                                    double weight, float* grams, cudaStream_t stream) {
  for_each_table(entries, [&](const Table<PenaltyEntry>& table, int64_t count, int64_t first) {
    FASTLORA_LAUNCH(penalty_grad_kernel, 2 * count, kGramThreads, stream, table, weights, weight_type, first, weight,
                    grams);
  });
  return cudaGetLastError();
}

}  // namespace fastlora::cuda

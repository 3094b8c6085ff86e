// sum_m w_m s_m^2 ||B_m A_m||_F^2 and its gradient for the matrices of all layers, through r x r Gram matrices.
#pragma once
#include "cuda/block.cuh"
#include "cuda/numbers.cuh"
#include "cuda/table.cuh"

namespace fastlora::cuda {

constexpr int kGram = 16;  // rows and columns of a Gram matrix that a block computes at a time, one a thread
constexpr int kGramThreads = kGram * kGram;
constexpr int kGramDepth = 64;
constexpr int64_t kGramChunk = 512;  // of a factor's long side: what a block takes
constexpr int kGramSums = 4;         // blocks that sum a Gram matrix

struct PenaltyEntry {
  const void *A, *B;  // [rank, depth], [width, rank]
  void *dA, *dB;      // the same shapes, or null
  int64_t lda, ldb, ldda, lddb, depth, width, rank;
  int64_t grams;  // where the chunks' A A^T and then their B^T B lie in the scratch memory; the first holds the sum
  int64_t end;    // blocks up to and with this matrix's
  double scale;
  Number type_A, type_B, type_dA, type_dB;
};

// Element (i, k) of a [rank, depth] matrix lies at i * rank_stride + k * depth_stride.
struct Operand {
  const void* data;
  Number type;
  int64_t rank_stride, depth_stride, rank, begin, end;  // the depth from begin to end
};

__device__ __forceinline__ Operand operand_A(const PenaltyEntry& e) {
  return {e.A, e.type_A, e.lda, 1, e.rank, 0, e.depth};
}
__device__ __forceinline__ Operand operand_B(const PenaltyEntry& e) {
  return {e.B, e.type_B, 1, e.ldb, e.rank, 0, e.width};
}

// tile[i][k] = operand[first + i, start + k]; what lies outside reads as zero. Neighbours in memory go to neighbours
// among the threads.
__device__ __forceinline__ void stage(const Operand& o, int64_t first, int64_t start, float (*tile)[kGramDepth + 1]) {
  const bool by_depth = o.depth_stride == 1;
  for (int e = threadIdx.x; e < kGram * kGramDepth; e += kGramThreads) {
    const int i = by_depth ? e / kGramDepth : e % kGram, k = by_depth ? e % kGramDepth : e / kGram;
    const bool inside = first + i < o.rank && start + k < o.end;
    const int64_t at = (first + i) * o.rank_stride + (start + k) * o.depth_stride;
    tile[i][k] = inside ? load_number(o.data, o.type, at) : 0.0f;
  }
}

// sum_k operand[first_i + i, k] operand[first_j + j, k] for the thread i * 16 + j
__device__ __forceinline__ float gram_element(const Operand& o, int64_t first_i, int64_t first_j) {
  __shared__ float left[kGram][kGramDepth + 1], right[kGram][kGramDepth + 1];
  const int i = threadIdx.x / kGram, j = threadIdx.x % kGram;
  float sum = 0.0f;
  for (int64_t start = o.begin; start < o.end; start += kGramDepth) {
    __syncthreads();
    stage(o, first_i, start, left);
    stage(o, first_j, start, right);
    __syncthreads();
#pragma unroll 16
    for (int k = 0; k < kGramDepth; ++k) sum += left[i][k] * right[j][k];
  }
  return sum;
}

__host__ __device__ __forceinline__ int64_t gram_chunks(int64_t size) { return (size + kGramChunk - 1) / kGramChunk; }
// One at least, so that the sum of no chunks has a place.
__host__ __device__ __forceinline__ int64_t gram_places(int64_t size) { return size > 0 ? gram_chunks(size) : 1; }

// One chunk of one factor of a matrix.
struct Chunk {
  const PenaltyEntry& entry;
  int64_t matrix, number;
  bool of_A;

  __device__ __forceinline__ int64_t begin() const { return number * kGramChunk; }
  __device__ __forceinline__ int64_t end() const {
    const int64_t size = of_A ? entry.depth : entry.width;
    return size - begin() < kGramChunk ? size : begin() + kGramChunk;
  }
  // Of the gradients, that of the other factor needs this one's Gram matrix.
  __device__ __forceinline__ bool is_needed() const { return (of_A ? entry.dB : entry.dA) != nullptr; }
};

__device__ __forceinline__ Chunk chunk_of(const Table<PenaltyEntry>& table, int64_t matrices) {
  const int64_t m = entry_of(blockIdx.x, matrices, [&](int64_t i) { return table.entries[i].end; });
  const int64_t number = blockIdx.x - (m > 0 ? table.entries[m - 1].end : 0);
  const PenaltyEntry& e = table.entries[m];
  const int64_t chunks_A = gram_chunks(e.depth);
  return number < chunks_A ? Chunk{e, m, number, true} : Chunk{e, m, number - chunks_A, false};
}

__device__ __forceinline__ float* gram_place(float* grams, const PenaltyEntry& e, bool of_A) {
  return grams + e.grams + (of_A ? 0 : gram_places(e.depth) * e.rank * e.rank);
}

// Each chunk's own A A^T or B^T B. Left to itself the compiler keeps 40 registers and spills two.
__global__ void __launch_bounds__(kGramThreads, 4)
    grams_kernel(const __grid_constant__ Table<PenaltyEntry> table, int64_t matrices, bool gradient, float* grams) {
  const Chunk chunk = chunk_of(table, matrices);
  if (gradient && !chunk.is_needed()) return;
  const PenaltyEntry& e = chunk.entry;
  Operand o = chunk.of_A ? operand_A(e) : operand_B(e);
  o.begin = chunk.begin();
  o.end = chunk.end();
  float* gram = gram_place(grams, e, chunk.of_A) + chunk.number * e.rank * e.rank;
  const int row = threadIdx.x / kGram, column = threadIdx.x % kGram;
  for (int64_t i = 0; i < e.rank; i += kGram) {
    for (int64_t j = 0; j < e.rank; j += kGram) {
      const float value = gram_element(o, i, j);
      if (i + row < e.rank && j + column < e.rank) gram[(i + row) * e.rank + j + column] = value;
    }
  }
}

// The first chunk's place of each factor becomes the sum of all, in their order.
__global__ void __launch_bounds__(kGramThreads)
    sum_grams_kernel(const __grid_constant__ Table<PenaltyEntry> table, bool gradient, float* grams) {
  const int64_t half = blockIdx.x / kGramSums;
  const PenaltyEntry& e = table.entries[half / 2];
  const bool of_A = half % 2 == 0;
  if (gradient && (of_A ? e.dB : e.dA) == nullptr) return;
  const int64_t size = e.rank * e.rank, chunks = gram_chunks(of_A ? e.depth : e.width);
  float* gram = gram_place(grams, e, of_A);
  for (int64_t i = blockIdx.x % kGramSums * kGramThreads + threadIdx.x; i < size; i += kGramSums * kGramThreads) {
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks; ++c) sum += gram[c * size + i];
    gram[i] = sum;
  }
}

// One block per matrix: values[first + m] = w_m s_m^2 sum (A A^T o B^T B)
__global__ void __launch_bounds__(kGramThreads)
    penalty_kernel(const __grid_constant__ Table<PenaltyEntry> table, const void* weights, Number weight_type,
                   int64_t first, float* grams, double* values) {
  const PenaltyEntry& e = table.entries[blockIdx.x];
  const float *of_A = gram_place(grams, e, true), *of_B = gram_place(grams, e, false);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < e.rank * e.rank; i += kGramThreads) sum += static_cast<double>(of_A[i]) * of_B[i];
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

// dA [r, K] += c gram A in a chunk of the columns: a thread takes a column, and 8 rows at a time
__device__ __forceinline__ void add_to_dA(const Chunk& chunk, float coefficient, const float* gram) {
  constexpr int kRows = 8;
  const PenaltyEntry& e = chunk.entry;
  for (int64_t k = chunk.begin() + threadIdx.x; k < chunk.end(); k += kGramThreads) {
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
        if (i < rows) store_number(e.dA, e.type_dA, at, load_number(e.dA, e.type_dA, at) + coefficient * sums[i]);
      }
    }
  }
}

// dB [N, r] += c B gram in a chunk of the rows: a thread takes an element
__device__ __forceinline__ void add_to_dB(const Chunk& chunk, float coefficient, const float* gram) {
  const PenaltyEntry& e = chunk.entry;
  for (int64_t i = chunk.begin() * e.rank + threadIdx.x; i < chunk.end() * e.rank; i += kGramThreads) {
    const int64_t n = i / e.rank, j = i % e.rank;
    float sum = 0.0f;
    for (int64_t q = 0; q < e.rank; ++q) {
      sum += load_number(e.B, e.type_B, n * e.ldb + q) * gram[q * e.rank + j];
    }
    const int64_t at = n * e.lddb + j;
    store_number(e.dB, e.type_dB, at, load_number(e.dB, e.type_dB, at) + coefficient * sum);
  }
}

// A block per chunk: dA needs B^T B alone, and dB needs A A^T alone.
__global__ void __launch_bounds__(kGramThreads)
    penalty_grad_kernel(const __grid_constant__ Table<PenaltyEntry> table, int64_t matrices, const void* weights,
                        Number weight_type, int64_t first, double weight, float* grams) {
  const Chunk chunk = chunk_of(table, matrices);
  const PenaltyEntry& e = chunk.entry;
  if ((chunk.of_A ? e.dA : e.dB) == nullptr) return;
  const double of_matrix = load_double(weights, weight_type, first + chunk.matrix);
  const float coefficient = static_cast<float>(2.0 * weight * of_matrix * e.scale * e.scale);
  const float* gram = gram_place(grams, e, !chunk.of_A);
  if (chunk.of_A) {
    add_to_dA(chunk, coefficient, gram);
  } else {
    add_to_dB(chunk, coefficient, gram);
  }
}

// How many floats of scratch memory a matrix takes.
inline int64_t gram_floats(const PenaltyEntry& e) {
  return (gram_places(e.depth) + gram_places(e.width)) * e.rank * e.rank;
}

// Starts the two kernels that make the Gram matrices of a table; returns the number of its chunks.
inline int64_t sum_grams(Table<PenaltyEntry>& table, int64_t count, bool gradient, float* grams, cudaStream_t stream) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    PenaltyEntry& e = table.entries[i];
    e.end = chunks += gram_chunks(e.depth) + gram_chunks(e.width);
  }
  if (chunks > 0) FASTLORA_LAUNCH(grams_kernel, chunks, kGramThreads, stream, table, count, gradient, grams);
  FASTLORA_LAUNCH(sum_grams_kernel, 2 * kGramSums * count, kGramThreads, stream, table, gradient, grams);
  return chunks;
}

// Scratch: grams, where `entries` say; values, one for each matrix
inline cudaError_t write_penalty(const std::vector<PenaltyEntry>& entries, const void* weights, Number weight_type,
                                 float* grams, double* values, float* total, cudaStream_t stream) {
  for_each_table(entries, [&](Table<PenaltyEntry>& table, int64_t count, int64_t first) {
    sum_grams(table, count, false, grams, stream);
    FASTLORA_LAUNCH(penalty_kernel, count, kGramThreads, stream, table, weights, weight_type, first, grams, values);
  });
  FASTLORA_LAUNCH(total_kernel, 1, kGramThreads, stream, values, static_cast<int64_t>(entries.size()), total);
  return cudaGetLastError();
}

// grams: scratch, where `entries` say
inline cudaError_t add_penalty_grad(const std::vector<PenaltyEntry>& entries, const void* weights, Number weight_type,
                                    double weight, float* grams, cudaStream_t stream) {
  for_each_table(entries, [&](Table<PenaltyEntry>& table, int64_t count, int64_t first) {
    const int64_t chunks = sum_grams(table, count, true, grams, stream);
    if (chunks == 0) return;
    FASTLORA_LAUNCH(penalty_grad_kernel, chunks, kGramThreads, stream, table, count, weights, weight_type, first,
                    weight, grams);
  });
  return cudaGetLastError();
}

}  // namespace fastlora::cuda

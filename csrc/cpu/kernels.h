// Single-thread kernels on row blocks, one table per instruction set. All strides count elements; the last one is 1.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/floats.h"

namespace fastlora {

struct DropoutRow {
  uint64_t seed;
  int64_t row;
  uint32_t projection;
  uint32_t threshold;
  float scale;
};

// Ranks offset.. of one projection, and the bits of its mask of a block of rows, `words` words a row.
struct Kept {
  const uint32_t* keep;
  int64_t words, offset, rank;
};

// Kernels that read or write tensors in their own dtype T.
template <class T>
struct TypedKernels {
  // y[m, n] += sum_r s[m, r] b[r, n]
  void (*expand)(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank, int64_t columns,
                 T* y, int64_t ldy);
  // y[m, n] += sum_i keep_i[m, n] sum_r s[m, r] b[r, n] over the ranks r of each part i
  void (*expand_kept)(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, const Kept* parts,
                      int64_t count, int64_t columns, T* y, int64_t ldy);
  // sum[n] += sum_m y[m, n];  squares[n] += sum_m y[m, n]^2, from sums shifted by a rough mean of the block; on bf16,
  // where the processor has a product of pairs, from sums over few rows, with subnormal operands and sums as zero
  void (*moments)(const T* y, int64_t ldy, int64_t rows, int64_t columns, double* sum, double* squares);
  // out[k] = scale x[k] where bit k is set, else 0
  void (*dropout)(const T* x, const uint32_t* bits, float scale, T* out, int64_t count);
  void (*widen)(const T* from, float* to, int64_t count);
  void (*narrow)(const float* from, T* to, int64_t count);
};

struct Kernels {
  const char* name;
  // s[m, r] = sum_k x[m, k] a[r, k]
  void (*dot)(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t lda, int64_t rank, int64_t depth,
              float* s, int64_t lds);
  // g[r, n] += sum_m d[m, r] x[m, n]
  void (*outer)(const float* d, int64_t ldd, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t columns,
                float* g, int64_t ldg);
  // As dot, outer and keep, on bf16 operands with fp32 sums; null where the processor has no product of bf16 pairs.
  // Subnormal operands and sums count as zero.
  void (*dot_bf16)(const bf16* x, int64_t ldx, int64_t rows, const bf16* a, int64_t lda, int64_t rank, int64_t depth,
                   float* s, int64_t lds);
  void (*outer_bf16)(const bf16* d, int64_t ldd, int64_t rank, const bf16* x, int64_t ldx, int64_t rows,
                     int64_t columns, float* g, int64_t ldg);
  void (*keep_bf16)(const bf16* x, const uint32_t* bits, bf16* out, int64_t count);
  // bit k % 32 of word k / 32 of a row: whether dropout keeps column k; (columns + 31) / 32 words for each of the rows
  // that start at `row`
  void (*keep_bits)(int64_t columns, const DropoutRow& row, int64_t rows, uint32_t* bits);
  // out[k] = x[k] where bit k is set, else 0
  void (*keep)(const float* x, const uint32_t* bits, float* out, int64_t count);
  // signs of the bits of `counters` Philox counters (first + i, row, row >> 32, projection): 128 each
  void (*signs)(uint64_t first, const DropoutRow& row, int64_t counters, float* out);
  // squares += sum of t^2, absolute += sum of |t|
  void (*norms)(const float* t, int64_t count, double* squares, double* absolute);
  TypedKernels<float> of_float;
  TypedKernels<bf16> of_bf16;
  TypedKernels<fp16> of_fp16;

  template <class T>
  const TypedKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>) {
      return of_float;
    } else if constexpr (std::is_same_v<T, bf16>) {
      return of_bf16;
    } else {
      return of_fp16;
    }
  }
};

// The best table that this processor can run; FASTLORA_CPU_ISA=avx512_bf16|avx512|avx2|portable lowers the choice.
// avx512_bf16_emulated is for tests: the kernels of avx512_bf16, their one new instruction written out in others.
const Kernels& kernels();

// Whether this process was forked after the library was loaded: OpenMP's threads stay behind in the parent, and waiting
// for them would never end.
bool in_forked_child();

}  // namespace fastlora

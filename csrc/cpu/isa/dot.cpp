// s = x A^T for a skinny A: tiles of rows x rank columns, summed over the depth in registers.
#include "cpu/isa/dot.h"
#include "cpu/isa/table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <int Rows, int Columns>
FASTLORA_INLINE void tile(const float* x, int64_t ldx, const float* a, int64_t lda, int64_t depth, float* s,
                          int64_t lds, bool accumulate) {
  Vec sums[Rows * Columns] = {};
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Vec row[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      row[i] = load(x + i * ldx + k);
      // The next rows: the hardware restarts its own prefetching at every row of a strided matrix.
      __builtin_prefetch(x + (i + Rows) * ldx + k, 0, 3);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) {
      const Vec factor = load(a + j * lda + k);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) sums[i * Columns + j] = fma(row[i], factor, sums[i * Columns + j]);
    }
  }
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
    Vec row[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) row[i] = load(x + i * ldx + k, rest);
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) {
      const Vec factor = load(a + j * lda + k, rest);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) sums[i * Columns + j] = fma(row[i], factor, sums[i * Columns + j]);
    }
  }
  store_sums<Rows, Columns>(sums, s, lds, accumulate);
}

template <int Columns>
void panel(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t lda, int64_t depth, float* s, int64_t lds,
           bool accumulate) {
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows) {
    tile<kDotRows, Columns>(x + m * ldx, ldx, a, lda, depth, s + m * lds, lds, accumulate);
  }
  for (; m < rows; ++m) tile<1, Columns>(x + m * ldx, ldx, a, lda, depth, s + m * lds, lds, accumulate);
}

using Panel = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
constexpr Panel kPanels[kDotColumns] = {panel<1>, panel<2>, panel<3>, panel<4>, panel<5>, panel<6>};

}  // namespace

void dot(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t lda, int64_t rank, int64_t depth, float* s,
         int64_t lds) {
  if (depth == 0) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t r = 0; r < rank; ++r) s[m * lds + r] = 0.0f;
    }
  }
  // Panels of nearly equal width: a narrow last one would leave the multipliers waiting.
  const int64_t panels = (rank + kDotColumns - 1) / kDotColumns;
  for (int64_t k = 0; k < depth; k += kDotDepth) {
    const int64_t part = depth - k < kDotDepth ? depth - k : kDotDepth;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * rank / panels, width = (p + 1) * rank / panels - first;
      kPanels[width - 1](x + k, ldx, rows, a + first * lda + k, lda, part, s + first, lds, k > 0);
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA

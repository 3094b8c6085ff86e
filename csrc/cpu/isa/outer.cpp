// g += d^T x for a skinny d: tiles of rank x columns stay in registers over the rows of the block.
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kRanks = kAccumulators / 2;

// Vectors of columns beside Ranks broadcast values, so that rank x columns fills the accumulators.
constexpr int columns_for(int ranks) {
  const int columns = kAccumulators / ranks;
  return columns > 4 ? 4 : columns;
}

template <int Ranks, int Columns>
FASTLORA_INLINE void tile(const float* d, int64_t ldd, const float* x, int64_t ldx, int64_t rows, float* g,
                          int64_t ldg) {
  Vec sums[Ranks][Columns];
#pragma GCC unroll 12
  for (int r = 0; r < Ranks; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) sums[r][q] = load(g + r * ldg + q * kWidth);
  }
  // There is at least one row: a loop that may be skipped makes the compiler keep a second copy of the sums.
  int64_t m = 0;
  do {
    Vec row[Columns];
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) {
      row[q] = load(x + m * ldx + q * kWidth);
      // Walking down a column strip defeats the hardware's prefetcher: ask for the next strip.
      __builtin_prefetch(x + m * ldx + (Columns + q) * kWidth, 0, 3);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Ranks; ++r) {
      const Vec factor = set1(d[m * ldd + r]);
#pragma GCC unroll 4
      for (int q = 0; q < Columns; ++q) sums[r][q] = fma(factor, row[q], sums[r][q]);
    }
  } while (++m < rows);
#pragma GCC unroll 12
  for (int r = 0; r < Ranks; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) store(g + r * ldg + q * kWidth, sums[r][q]);
  }
}

template <int Ranks>
FASTLORA_INLINE void tail(const float* d, int64_t ldd, const float* x, int64_t ldx, int64_t rows, int count, float* g,
                          int64_t ldg) {
  Vec sums[Ranks] = {};
  for (int64_t m = 0; m < rows; ++m) {
    const Vec row = load(x + m * ldx, count);
#pragma GCC unroll 12
    for (int r = 0; r < Ranks; ++r) sums[r] = fma(set1(d[m * ldd + r]), row, sums[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < Ranks; ++r) store(g + r * ldg, load(g + r * ldg, count) + sums[r], count);
}

template <int Ranks>
void strip(const float* d, int64_t ldd, const float* x, int64_t ldx, int64_t rows, int64_t columns, float* g,
           int64_t ldg) {
  constexpr int kColumns = columns_for(Ranks);
  int64_t n = 0;
  for (; n + kColumns * kWidth <= columns; n += kColumns * kWidth) {
    tile<Ranks, kColumns>(d, ldd, x + n, ldx, rows, g + n, ldg);
  }
  for (; n + kWidth <= columns; n += kWidth) tile<Ranks, 1>(d, ldd, x + n, ldx, rows, g + n, ldg);
  if (n < columns) tail<Ranks>(d, ldd, x + n, ldx, rows, static_cast<int>(columns - n), g + n, ldg);
}

using Strip = void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int64_t);
constexpr Strip kStrips[] = {strip<1>,  strip<2>, strip<3>, strip<4>,
                             strip<5>,  strip<6>,
#if defined(__AVX512F__)
                             strip<7>,  strip<8>, strip<9>, strip<10>,
                             strip<11>, strip<12>
#endif
};
static_assert(sizeof(kStrips) / sizeof(Strip) == kRanks, "one entry per rank");

}  // namespace

void outer(const float* d, int64_t ldd, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t columns,
           float* g, int64_t ldg) {
  if (rows == 0) return;
  const int64_t strips = (rank + kRanks - 1) / kRanks;
  for (int64_t p = 0; p < strips; ++p) {
    const int64_t first = p * rank / strips, width = (p + 1) * rank / strips - first;
    kStrips[width - 1](d + first, ldd, x, ldx, rows, columns, g + first * ldg, ldg);
  }
}

}  // namespace fastlora::FASTLORA_ISA

// The skinny products on bf16 operands, two at a time: s = x A^T and g += d^T x with fp32 sums.
#include "cpu/isa/dot.h"
#include "cpu/isa/table.h"

#if defined(FASTLORA_BF16_PAIRS)

namespace fastlora::FASTLORA_ISA {
namespace {

template <int Rows, int Columns, class Load>
FASTLORA_INLINE void add_products(Vec* sums, const Load& of_x, const Load& of_a) {
  VecU32 row[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) row[i] = of_x(i);
#pragma GCC unroll 8
  for (int j = 0; j < Columns; ++j) {
    const VecU32 factor = of_a(j);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sums[i * Columns + j] = dot_pairs(sums[i * Columns + j], row[i], factor);
  }
}

// Rows of a matrix at one place of the depth: count elements, or a full vector of pairs.
struct Strided {
  const bf16* p;
  int64_t stride;
  int count;
  FASTLORA_INLINE VecU32 operator()(int i) const {
    return count == 2 * kWidth ? load_pairs(p + i * stride) : load_pairs(p + i * stride, count);
  }
};

template <int Rows, int Columns>
FASTLORA_INLINE void tile(const bf16* x, int64_t ldx, const bf16* a, int64_t lda, int64_t depth, float* s, int64_t lds,
                          bool accumulate) {
  constexpr int kPairs = 2 * kWidth;
  Vec sums[Rows * Columns] = {};
  int64_t k = 0;
  for (; k + kPairs <= depth; k += kPairs) {
    add_products<Rows, Columns>(sums, Strided{x + k, ldx, kPairs}, Strided{a + k, lda, kPairs});
  }
  if (k < depth) {
    const int rest = static_cast<int>(depth - k);
    add_products<Rows, Columns>(sums, Strided{x + k, ldx, rest}, Strided{a + k, lda, rest});
  }
  store_sums<Rows, Columns>(sums, s, lds, accumulate);
}

template <int Columns>
void panel(const bf16* x, int64_t ldx, int64_t rows, const bf16* a, int64_t lda, int64_t depth, float* s, int64_t lds,
           bool accumulate) {
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows) {
    tile<kDotRows, Columns>(x + m * ldx, ldx, a, lda, depth, s + m * lds, lds, accumulate);
  }
  for (; m < rows; ++m) tile<1, Columns>(x + m * ldx, ldx, a, lda, depth, s + m * lds, lds, accumulate);
}

using Panel = void (*)(const bf16*, int64_t, int64_t, const bf16*, int64_t, int64_t, float*, int64_t, bool);
constexpr Panel kPanels[kDotColumns] = {panel<1>, panel<2>, panel<3>, panel<4>, panel<5>, panel<6>};

// With as many ranks, two vectors of columns fill the accumulators.
constexpr int kRanks = kAccumulators / 2;
// Rows whose values of d are paired at a time.
constexpr int kPairedRows = 64;
constexpr int kBlock = 2 * kWidth;

// sums[r] += (d[m, r], d[m + 1, r]) . (x[m, n], x[m + 1, n]) over the pairs of rows and blocks of 2 * kWidth columns,
// of the last of which `count` are there. Pairs come in the order of `interleave_rows` and leave in that of columns.
template <int Ranks, int Blocks>
FASTLORA_INLINE void outer_tile(const uint32_t* pairs, const bf16* x, int64_t ldx, int rows, int count, float* g,
                                int64_t ldg) {
  const auto row_of = [&](int m, int q) {
    const bf16* p = x + m * ldx + q * kBlock;
    return count == kBlock ? load_pairs(p) : load_pairs(p, count);
  };
  Vec sums[Ranks][2 * Blocks] = {};
  for (int m = 0; m < rows; m += 2) {
    VecU32 row[2 * Blocks];
#pragma GCC unroll 2
    for (int q = 0; q < Blocks; ++q) {
      const VecU32 lower = row_of(m, q), upper = m + 1 < rows ? row_of(m + 1, q) : VecU32{};
      row[2 * q] = interleave_rows<0>(lower, upper);
      row[2 * q + 1] = interleave_rows<1>(lower, upper);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Ranks; ++r) {
      const VecU32 factor = pairs[(m / 2) * Ranks + r] + VecU32{};
#pragma GCC unroll 4
      for (int q = 0; q < 2 * Blocks; ++q) sums[r][q] = dot_pairs(sums[r][q], factor, row[q]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Ranks; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 2 * Blocks; ++q) {
      float* to = g + r * ldg + q * kWidth;
      const Vec own = q % 2 ? in_order<1>(sums[r][q - 1], sums[r][q]) : in_order<0>(sums[r][q], sums[r][q + 1]);
      const int there = count - q % 2 * kWidth;
      if (there >= kWidth) {
        store(to, load(to) + own);
      } else if (there > 0) {
        store(to, load(to, there) + own, there);
      }
    }
  }
}

template <int Ranks>
void outer_rows(const bf16* d, int64_t ldd, const bf16* x, int64_t ldx, int rows, int64_t columns, float* g,
                int64_t ldg) {
  uint32_t pairs[kPairedRows / 2 * Ranks];
  for (int m = 0; m < rows; m += 2) {
    for (int r = 0; r < Ranks; ++r) {
      const uint32_t upper = m + 1 < rows ? d[(m + 1) * ldd + r].bits : 0;
      pairs[(m / 2) * Ranks + r] = d[m * ldd + r].bits | (upper << 16);
    }
  }
  int64_t n = 0;
  if constexpr (Ranks <= kRanks / 2) {
    for (; n + 2 * kBlock <= columns; n += 2 * kBlock) {
      outer_tile<Ranks, 2>(pairs, x + n, ldx, rows, kBlock, g + n, ldg);
    }
  }
  for (; n + kBlock <= columns; n += kBlock) outer_tile<Ranks, 1>(pairs, x + n, ldx, rows, kBlock, g + n, ldg);
  if (n < columns) outer_tile<Ranks, 1>(pairs, x + n, ldx, rows, static_cast<int>(columns - n), g + n, ldg);
}

using OuterRows = void (*)(const bf16*, int64_t, const bf16*, int64_t, int, int64_t, float*, int64_t);
constexpr OuterRows kOuterRows[kRanks] = {outer_rows<1>, outer_rows<2>,  outer_rows<3>,  outer_rows<4>,
                                          outer_rows<5>, outer_rows<6>,  outer_rows<7>,  outer_rows<8>,
                                          outer_rows<9>, outer_rows<10>, outer_rows<11>, outer_rows<12>};

}  // namespace

void dot_bf16(const bf16* x, int64_t ldx, int64_t rows, const bf16* a, int64_t lda, int64_t rank, int64_t depth,
              float* s, int64_t lds) {
  constexpr int64_t kDepth = 2 * kDotDepth;
  const int64_t panels = (rank + kDotColumns - 1) / kDotColumns;
  int64_t k = 0;
  do {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * rank / panels, width = (p + 1) * rank / panels - first;
      kPanels[width - 1](x + k, ldx, rows, a + first * lda + k, lda, part, s + first, lds, k > 0);
    }
    k += kDepth;
  } while (k < depth);
}

void outer_bf16(const bf16* d, int64_t ldd, int64_t rank, const bf16* x, int64_t ldx, int64_t rows, int64_t columns,
                float* g, int64_t ldg) {
  const int64_t strips = (rank + kRanks - 1) / kRanks;
  for (int64_t m = 0; m < rows; m += kPairedRows) {
    const int count = rows - m < kPairedRows ? static_cast<int>(rows - m) : kPairedRows;
    for (int64_t p = 0; p < strips; ++p) {
      const int64_t first = p * rank / strips, width = (p + 1) * rank / strips - first;
      kOuterRows[width - 1](d + m * ldd + first, ldd, x + m * ldx, ldx, count, columns, g + first * ldg, ldg);
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA

#endif

// y += s b in place for a skinny s, and the column sums of y.
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kColumns = 4;
constexpr int kRows = kAccumulators / kColumns;

template <int Rows, int Columns, class T>
FASTLORA_INLINE void store_tile(const Vec (&sums)[Rows][Columns], T* y, int64_t ldy) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) store(y + i * ldy + q * kWidth, sums[i][q]);
  }
}

#if defined(__AVX512BF16__)
// The processor's own rounding, a third of the instructions, where it gives the same bits.
template <int Rows, int Columns>
FASTLORA_INLINE void store_tile(const Vec (&sums)[Rows][Columns], bf16* y, int64_t ldy) {
  uint32_t otherwise = 0;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) otherwise |= rounds_otherwise(sums[i][q]);
  }
  if (otherwise) return store_tile<Rows, Columns, bf16>(sums, y, ldy);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) store_rounded(y + i * ldy + q * kWidth, sums[i][q]);
  }
}
#endif

template <int Rows, int Columns, class T>
FASTLORA_INLINE void tile(const float* s, int64_t lds, const float* b, int64_t ldb, int64_t rank, T* y, int64_t ldy) {
  Vec sums[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) {
      sums[i][q] = load(y + i * ldy + q * kWidth);
      __builtin_prefetch(y + (i + Rows) * ldy + q * kWidth, 1, 2);
    }
  }
  // The rank is at least 1: a loop that may be skipped makes the compiler keep a second copy of the sums.
  int64_t r = 0;
  do {
    Vec row[Columns];
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) row[q] = load(b + r * ldb + q * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = set1(s[i * lds + r]);
#pragma GCC unroll 4
      for (int q = 0; q < Columns; ++q) sums[i][q] = fma(factor, row[q], sums[i][q]);
    }
  } while (++r < rank);
  store_tile(sums, y, ldy);
}

template <class T>
void tail(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank, int count, T* y,
          int64_t ldy) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec sum = load(y + i * ldy, count);
    for (int64_t r = 0; r < rank; ++r) sum = fma(set1(s[i * lds + r]), load(b + r * ldb, count), sum);
    store(y + i * ldy, sum, count);
  }
}

template <int Rows, class T>
void strip(const float* s, int64_t lds, const float* b, int64_t ldb, int64_t rank, int64_t columns, T* y, int64_t ldy) {
  int64_t n = 0;
  for (; n + kColumns * kWidth <= columns; n += kColumns * kWidth) {
    tile<Rows, kColumns>(s, lds, b + n, ldb, rank, y + n, ldy);
  }
  for (; n + kWidth <= columns; n += kWidth) tile<Rows, 1>(s, lds, b + n, ldb, rank, y + n, ldy);
  if (n < columns) tail(s, lds, Rows, b + n, ldb, rank, static_cast<int>(columns - n), y + n, ldy);
}

// The last rows, fewer than Rows + 1 of them, as one strip.
template <int Rows, class T>
void last_strip(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank, int64_t columns,
                T* y, int64_t ldy) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      strip<Rows>(s, lds, b, ldb, rank, columns, y, ldy);
    } else {
      last_strip<Rows - 1>(s, lds, rows, b, ldb, rank, columns, y, ldy);
    }
  }
}

// Half the tile: beside the sums, one part's own, which its mask has still to pass.
constexpr int kKeptRows = kRows / 2;

template <int Rows, int Columns, class T>
FASTLORA_INLINE void kept_tile(const float* s, int64_t lds, const float* b, int64_t ldb, const Kept* parts,
                               int64_t count, int64_t m, int64_t n, T* y, int64_t ldy) {
  Vec sums[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) sums[i][q] = load(y + i * ldy + q * kWidth);
  }
  for (const Kept* part = parts; part < parts + count; ++part) {
    Vec own[Rows][Columns] = {};
    for (int64_t r = part->offset; r < part->offset + part->rank; ++r) {
      Vec row[Columns];
#pragma GCC unroll 4
      for (int q = 0; q < Columns; ++q) row[q] = load(b + r * ldb + q * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const Vec factor = set1(s[i * lds + r]);
#pragma GCC unroll 4
        for (int q = 0; q < Columns; ++q) own[i][q] = fma(factor, row[q], own[i][q]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const uint32_t* keep = part->keep + (m + i) * part->words;
#pragma GCC unroll 4
      for (int q = 0; q < Columns; ++q) {
        const int64_t at = n + q * kWidth;
        sums[i][q] += kept(keep[at / 32] >> (at % 32), own[i][q]);
      }
    }
  }
  store_tile(sums, y, ldy);
}

template <class T>
void kept_tail(const float* s, const float* b, int64_t ldb, const Kept* parts, int64_t count, int64_t m, int64_t n,
               int rest, T* y) {
  Vec sum = load(y, rest);
  for (const Kept* part = parts; part < parts + count; ++part) {
    Vec own = {};
    for (int64_t r = part->offset; r < part->offset + part->rank; ++r)
      own = fma(set1(s[r]), load(b + r * ldb, rest), own);
    sum += kept(part->keep[m * part->words + n / 32] >> (n % 32), own);
  }
  store(y, sum, rest);
}

template <int Rows, class T>
void kept_strip(const float* s, int64_t lds, const float* b, int64_t ldb, const Kept* parts, int64_t count, int64_t m,
                int64_t columns, T* y, int64_t ldy) {
  int64_t n = 0;
  for (; n + kColumns * kWidth <= columns; n += kColumns * kWidth) {
    kept_tile<Rows, kColumns>(s, lds, b + n, ldb, parts, count, m, n, y + n, ldy);
  }
  for (; n + kWidth <= columns; n += kWidth) kept_tile<Rows, 1>(s, lds, b + n, ldb, parts, count, m, n, y + n, ldy);
  for (int i = 0; n < columns && i < Rows; ++i) {
    const int rest = static_cast<int>(columns - n);
    kept_tail(s + i * lds, b + n, ldb, parts, count, m + i, n, rest, y + i * ldy + n);
  }
}

template <class T>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<bf16> = true;

// The sums are shifted by a rough mean: where the mean is far larger than the spread, plain fp32 sums would lose it.
// Vectors come in pairs of even and odd columns where they are Halves.
template <int Columns, bool Halves, class Load>
FASTLORA_INLINE void column_moments(int64_t rows, int count, const Load& element, double* sum, double* squares) {
  const int64_t few = rows < 8 ? rows : 8;
  Vec shift[Columns] = {}, first[Columns] = {}, second[Columns] = {};
  for (int64_t m = 0; m < few; ++m) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) shift[q] += element(m, q);
  }
#pragma GCC unroll 4
  for (int q = 0; q < Columns; ++q) shift[q] *= 1.0f / static_cast<float>(few);
  for (int64_t m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int q = 0; q < Columns; ++q) {
      const Vec delta = element(m, q) - shift[q];
      first[q] += delta;
      second[q] = fma(delta, delta, second[q]);
    }
  }
  if constexpr (Halves) {
    const auto put_in_order = [](Vec* v) {
      const Vec even = v[0], odd = v[1];
      v[0] = zip<0>(even, odd);
      v[1] = zip<1>(even, odd);
    };
#pragma GCC unroll 2
    for (int q = 0; q < Columns; q += 2) {
      put_in_order(shift + q);
      put_in_order(first + q);
      put_in_order(second + q);
    }
  }
  alignas(64) float centres[Columns * kWidth], totals[Columns * kWidth], scatters[Columns * kWidth];
#pragma GCC unroll 4
  for (int q = 0; q < Columns; ++q) {
    store(centres + q * kWidth, shift[q]);
    store(totals + q * kWidth, first[q]);
    store(scatters + q * kWidth, second[q]);
  }
  const double number = static_cast<double>(rows);
  for (int i = 0; i < count; ++i) {
    const double centre = centres[i], total = totals[i];
    sum[i] += number * centre + total;
    squares[i] += scatters[i] + centre * (2.0 * total + number * centre);
  }
}

#if defined(FASTLORA_BF16_PAIRS)
constexpr int kBlock = 2 * kWidth;

// Of bf16 values of which none is below half of the largest, the squares of so many add up in fp32 without an error:
// where a mean is far larger than the spread, plain sums lose nothing.
constexpr int64_t kExactRows = 64;

// Of blocks of columns, of the last of which `count` are there.
template <int Blocks>
FASTLORA_INLINE void paired_moments(const bf16* y, int64_t ldy, int64_t rows, int count, double* sum, double* squares) {
  const VecU32 ones = VecU32{} + 0x3f803f80u;
  Vec first[2 * Blocks] = {}, second[2 * Blocks] = {};
  const auto add = [&](int q, VecU32 pairs) {
    first[q] = dot_pairs(first[q], pairs, ones);
    second[q] = dot_pairs(second[q], pairs, pairs);
  };
  const auto row_of = [&](int64_t m, int q) {
    const bf16* p = y + m * ldy + q * kBlock;
    __builtin_prefetch(p + Blocks * kBlock, 0, 3);  // the next strip, as above
    return count == kBlock ? load_pairs(p) : load_pairs(p, count);
  };
  for (int64_t m = 0; m < rows; m += 2) {
#pragma GCC unroll 2
    for (int q = 0; q < Blocks; ++q) {
      const VecU32 lower = row_of(m, q), upper = m + 1 < rows ? row_of(m + 1, q) : VecU32{};
      add(2 * q, interleave_rows<0>(lower, upper));
      add(2 * q + 1, interleave_rows<1>(lower, upper));
    }
  }
  alignas(64) float totals[Blocks * kBlock], scatters[Blocks * kBlock];
#pragma GCC unroll 2
  for (int q = 0; q < 2 * Blocks; q += 2) {
    store(totals + q * kWidth, in_order<0>(first[q], first[q + 1]));
    store(totals + (q + 1) * kWidth, in_order<1>(first[q], first[q + 1]));
    store(scatters + q * kWidth, in_order<0>(second[q], second[q + 1]));
    store(scatters + (q + 1) * kWidth, in_order<1>(second[q], second[q + 1]));
  }
  for (int i = 0; i < (Blocks - 1) * kBlock + count; ++i) {
    sum[i] += totals[i];
    squares[i] += scatters[i];
  }
}

void moments_in_pairs(const bf16* y, int64_t ldy, int64_t rows, int64_t columns, double* sum, double* squares) {
  for (int64_t m = 0; m < rows; m += kExactRows) {
    const bf16* from = y + m * ldy;
    const int64_t some = rows - m < kExactRows ? rows - m : kExactRows;
    int64_t n = 0;
    for (; n + 2 * kBlock <= columns; n += 2 * kBlock) {
      paired_moments<2>(from + n, ldy, some, kBlock, sum + n, squares + n);
    }
    for (; n < columns; n += kBlock) {
      const int count = columns - n < kBlock ? static_cast<int>(columns - n) : kBlock;
      paired_moments<1>(from + n, ldy, some, count, sum + n, squares + n);
    }
  }
}
#endif

}  // namespace

template <class T>
void expand(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank, int64_t columns, T* y,
            int64_t ldy) {
  if (rank == 0) return;
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) strip<kRows>(s + m * lds, lds, b, ldb, rank, columns, y + m * ldy, ldy);
  last_strip<kRows - 1>(s + m * lds, lds, rows - m, b, ldb, rank, columns, y + m * ldy, ldy);
}

template <class T>
void expand_kept(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, const Kept* parts,
                 int64_t count, int64_t columns, T* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + kKeptRows <= rows; m += kKeptRows) {
    kept_strip<kKeptRows>(s + m * lds, lds, b, ldb, parts, count, m, columns, y + m * ldy, ldy);
  }
  for (; m < rows; ++m) kept_strip<1>(s + m * lds, lds, b, ldb, parts, count, m, columns, y + m * ldy, ldy);
}

template <class T>
void moments(const T* y, int64_t ldy, int64_t rows, int64_t columns, double* sum, double* squares) {
  if (rows == 0) return;
#if defined(FASTLORA_BF16_PAIRS)
  if constexpr (kInPairs<T>) return moments_in_pairs(y, ldy, rows, columns, sum, squares);
#endif
  constexpr int kStep = kColumns * kWidth;
  int64_t n = 0;
  for (; n + kStep <= columns; n += kStep) {
    if constexpr (kInPairs<T>) {
      const auto element = [&](int64_t m, int q) {
        const T* p = y + m * ldy + n + q / 2 * 2 * kWidth;
        // Walking down a column strip defeats the hardware's prefetcher: ask for the next strip.
        __builtin_prefetch(p + kStep, 0, 3);
        return q % 2 ? load_half<1>(p) : load_half<0>(p);
      };
      column_moments<kColumns, true>(rows, kStep, element, sum + n, squares + n);
    } else {
      const auto element = [&](int64_t m, int q) {
        __builtin_prefetch(y + m * ldy + n + kStep + q * kWidth, 0, 3);
        return load(y + m * ldy + n + q * kWidth);
      };
      column_moments<kColumns, false>(rows, kStep, element, sum + n, squares + n);
    }
  }
  for (; n < columns; n += kWidth) {
    const int count = columns - n < kWidth ? static_cast<int>(columns - n) : kWidth;
    const auto element = [&](int64_t m, int) { return load(y + m * ldy + n, count); };
    column_moments<1, false>(rows, count, element, sum + n, squares + n);
  }
}

template <class T>
void widen(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

template <class T>
void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

#define FASTLORA_INSTANTIATE(T)                                                                                      \
  template void expand<T>(const float*, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, T*, int64_t);     \
  template void expand_kept<T>(const float*, int64_t, int64_t, const float*, int64_t, const Kept*, int64_t, int64_t, \
                               T*, int64_t);                                                                         \
  template void moments<T>(const T*, int64_t, int64_t, int64_t, double*, double*);                                   \
  template void widen<T>(const T*, float*, int64_t);                                                                 \
  template void narrow<T>(const float*, T*, int64_t);
FASTLORA_INSTANTIATE(float)
FASTLORA_INSTANTIATE(bf16)
FASTLORA_INSTANTIATE(fp16)

}  // namespace fastlora::FASTLORA_ISA

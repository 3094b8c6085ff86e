// What the two kinds of skinny dot products share: the size of a tile, and how its sums leave the registers.
#pragma once
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kDotColumns = 6;
constexpr int kDotRows = kAccumulators / kDotColumns;
// Columns of A times this depth stay in the first-level cache.
constexpr int64_t kDotDepth = 1024;

template <int Rows, int Columns>
FASTLORA_INLINE void store_sums(Vec* sums, float* s, int64_t lds, bool accumulate) {
  constexpr int kCount = Rows * Columns;
  constexpr int kGroups = (kCount + kWidth - 1) / kWidth;
  alignas(64) float flat[kGroups * kWidth];
#pragma GCC unroll 8
  for (int group = 0; group < kGroups; ++group) {
    Vec part[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) part[i] = group * kWidth + i < kCount ? sums[group * kWidth + i] : Vec{};
    store(flat + group * kWidth, transposed_sum(part));
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Columns; ++j) {
      s[i * lds + j] = (accumulate ? s[i * lds + j] : 0.0f) + flat[i * Columns + j];
    }
  }
}

}  // namespace fastlora::FASTLORA_ISA

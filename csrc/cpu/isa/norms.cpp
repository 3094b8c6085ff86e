// Sums of squares and of absolute values.
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kSums = 4;
// fp32 lanes add up this many values each before they go to float64.
constexpr int64_t kTerms = 32;

FASTLORA_INLINE double total(Vec* sums) {
  double out = 0.0;
  for (int q = 0; q < kSums; ++q) {
    for (int i = 0; i < kWidth; ++i) out += static_cast<double>(sums[q][i]);
  }
  return out;
}

FASTLORA_INLINE Vec magnitude(Vec v) { return float_of(bits_of(v) & 0x7fffffffu); }

}  // namespace

void norms(const float* t, int64_t count, double* squares, double* absolute) {
  constexpr int64_t kStep = kSums * kWidth;
  int64_t i = 0;
  while (i < count) {
    Vec second[kSums] = {}, first[kSums] = {};
    const int64_t stop = count - i < kTerms * kStep ? count : i + kTerms * kStep;
    for (; i + kStep <= stop; i += kStep) {
#pragma GCC unroll 4
      for (int q = 0; q < kSums; ++q) {
        const Vec v = load(t + i + q * kWidth);
        second[q] = fma(v, v, second[q]);
        first[q] += magnitude(v);
      }
    }
    for (; i < stop; i += kWidth) {
      const Vec v = load(t + i, static_cast<int>(stop - i < kWidth ? stop - i : kWidth));
      second[0] = fma(v, v, second[0]);
      first[0] += magnitude(v);
    }
    *squares += total(second);
    *absolute += total(first);
  }
}

}  // namespace fastlora::FASTLORA_ISA

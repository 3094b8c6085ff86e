// What a step takes of its statistics on a CPU, on plain memory: between two steps the caches hold none of the code,
// and torch's way to an operator takes five times as long as the work. No torch types: `fastlora/_C.so` has the calls,
// `fastlora._node` makes them.
#pragma once
#include <cstdint>
#include <vector>

namespace fastlora {

// The gradient of a leaf: float32, or float64 where it is wide.
struct LeafGradient {
  const void* data;
  int64_t count;
  bool wide;
};

// Averages [kinds, matrices] that a sample is folded into, unless a number f of it is not finite:
// steps += n, means += w (f - means), w = weight, or n / steps where it is negative; else skipped += 1.
struct SampleAverages {
  double *means, *steps;
  int64_t* skipped;
  int64_t matrices;
  bool squares_first;  // whether the first kind is that of Q
};

// f: factor ||Q||^2 of each matrix, and of each run of columns of the moments V, [sum y; sum y^2] with the number of
// rows in one more column, the sum of max(0, E y^2 - (E y)^2); `runs` of each V, `sizes` of each run. Q or V may be
// empty.
struct Sample {
  std::vector<LeafGradient> Q, V;
  const std::vector<int64_t>&runs, &sizes;
  double factor, weight;
  int64_t n;
};

struct SampleCalls {
  // Of every type above. The two libraries share memory, so they compare it before they do.
  static constexpr int64_t kFormat = 1;
  int64_t format;
  void (*fold)(const Sample& sample, const SampleAverages& averages);
  // As the operator philox_signs_.
  void (*signs)(float* out, uint64_t seed, int64_t step, int64_t first, int64_t tag,
                const std::vector<int64_t>& counts);
};

}  // namespace fastlora

// Torch's threads, as many as its setting says.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace fastlora {

// Least number of operations that a thread is worth; under ThreadSanitizer small shapes have to show races too.
#ifdef __SANITIZE_THREAD__
constexpr int64_t worth_a_thread(int64_t) { return 1; }
#else
constexpr int64_t worth_a_thread(int64_t operations) { return operations; }
#endif

// Calls f(first, last) for ranges of [0, count) of at least `grain`, side by side. In a forked child on the caller
// alone: OpenMP's threads stayed behind in the parent.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  const int64_t threads = torch::stable::get_num_threads();
  if (count <= grain || threads == 1 || in_forked_child()) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see the barriers of the OpenMP runtime that torch brings.
  const int64_t ranges = std::min(threads, (count + grain - 1) / grain);
  std::vector<std::thread> started;
  for (int64_t i = 1; i < ranges; ++i) {
    started.emplace_back([&, i] { f(count * i / ranges, count * (i + 1) / ranges); });
  }
  f(int64_t{0}, count / ranges);
  for (std::thread& thread : started) thread.join();
#else
  torch::stable::parallel_for(0, count, grain, f);
#endif
}

}  // namespace fastlora

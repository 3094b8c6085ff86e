// Torch's threads, as many as its setting says, and the split of rows over them: it depends only on shapes and the
// number of threads, so that results repeat bit by bit.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/memory.h"

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
  if (count <= grain || torch::stable::get_num_threads() == 1 || in_forked_child()) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
#ifdef __SANITIZE_THREAD__
  // ThreadSanitizer does not see the barriers of the OpenMP runtime that torch brings.
  const int64_t ranges = std::min<int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
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

// Static split of rows into parts.
struct Parts {
  int64_t rows, count;

  Parts(int64_t rows_, int64_t work_per_row) : rows(rows_), count(1) {
    constexpr int64_t kWorkPerThread = worth_a_thread(1 << 19);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t useful = rows * std::max<int64_t>(work_per_row, 1) / kWorkPerThread;
    count = std::max<int64_t>(1, std::min({threads, useful, rows / 8}));
  }
  int64_t begin(int64_t part) const { return rows * part / count; }

  // Calls f(part, first row, last row) for every part.
  template <class F>
  void run(const F& f) const {
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) f(part, begin(part), begin(part + 1));
    });
  }

  // sums = those over all rows: f(first row, last row, sums) adds up a part's, and parts are added in their order.
  template <class F>
  void sum(float* sums, int64_t count_of_sums, const F& f) const {
    const Scratch<float> others((count - 1) * count_of_sums);
    const auto of_part = [&](int64_t part) { return part == 0 ? sums : others.get() + (part - 1) * count_of_sums; };
    run([&](int64_t part, int64_t first, int64_t last) {
      std::fill_n(of_part(part), count_of_sums, 0.0f);
      f(first, last, of_part(part));
    });
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = 0; i < count_of_sums; ++i) sums[i] += of_part(part)[i];
    }
  }
};

// Rows per block: a block of the widest matrix stays in the second-level cache. At least 48, over which the sums of a
// wide matrix are loaded and stored once; at most 192, because every row of a matrix lies on pages of its own.
inline int64_t block_rows(int64_t columns) {
  const int64_t rows = (int64_t{32} << 10) / std::max<int64_t>(columns, 1);
  return std::clamp<int64_t>(rows / 12 * 12, 48, 192);
}

}  // namespace fastlora

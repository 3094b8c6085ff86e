// The kernels of csrc/cuda for the host, with plain C functions for ctypes.
#include "cuda_emulator.h"

#include "cuda/segments.cuh"

using namespace fastlora::cuda;

extern "C" {

void set_seed(unsigned seed) { emulator::machine.random.seed(seed); }

void build_segments(const int64_t* ids, int64_t rows, int64_t adapters, int64_t* order, int64_t* ranges) {
  const SortProblem p = sort_problem(rows, adapters);
  std::vector<int64_t> counts(static_cast<size_t>((adapters + 1) * p.chunks), -77);
  std::vector<int64_t> totals(static_cast<size_t>(2 * (adapters + 1)), -77);
  sort_rows(ids, counts.data(), totals.data(), totals.data() + adapters + 1, order, ranges, p, nullptr);
}

void segment_tiles(const int64_t* ranges, int64_t adapters, int64_t block, int64_t count, int64_t* tiles) {
  std::vector<int64_t> ends(static_cast<size_t>(adapters) + 1, -77);
  write_tiles(ranges, ends.data(), tiles, adapters, block, count, nullptr);
}
}

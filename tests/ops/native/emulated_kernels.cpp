// The kernels of csrc/cuda for the host, with plain C functions for ctypes.
#include "cuda_emulator.h"

#include "cuda/multi_tensor.cuh"
#include "cuda/penalty.cuh"
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

// The value; with `gradient`, how much of the scratch memory nobody wrote: blocks that share it would race on a device.
// Per matrix, as the caller lays them out: A, B, dA, dB; lda, ldb, ldda, lddb, depth, width, rank; types of the four.
float penalty(const void* const* pointers, const int64_t* sizes, const int* types, const double* scales, int64_t count,
              const void* weights, int weight_type, double weight, bool gradient) {
  std::vector<PenaltyEntry> entries;
  int64_t grams = 0;
  for (int64_t m = 0; m < count; ++m) {
    const void* const* p = pointers + 4 * m;
    const int64_t* s = sizes + 7 * m;
    const int* t = types + 4 * m;
    entries.push_back({p[0], p[1], const_cast<void*>(p[2]), const_cast<void*>(p[3]), s[0], s[1], s[2], s[3], s[4], s[5],
                       s[6], grams, 0, scales[m], Number{t[0]}, Number{t[1]}, Number{t[2]}, Number{t[3]}});
    grams += gram_floats(entries.back());
  }
  float total = -77.0f;
  std::vector<float> scratch(static_cast<size_t>(grams), -77.0f);
  if (gradient) {
    add_penalty_grad(entries, weights, Number{weight_type}, weight, scratch.data(), nullptr);
    total = static_cast<float>(std::count(scratch.begin(), scratch.end(), -77.0f));
  } else {
    std::vector<double> values(static_cast<size_t>(count), -77.0);
    write_penalty(entries, weights, Number{weight_type}, scratch.data(), values.data(), &total, nullptr);
  }
  return total;
}

void squared_norms(const void* const* pointers, const int64_t* counts, const int* types, int64_t count, double* out) {
  std::vector<NormEntry> entries;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    entries.push_back({pointers[i], counts[i], Number{types[i]}, 0});
    blocks += norm_blocks(counts[i]);
  }
  std::vector<double> partial(static_cast<size_t>(blocks), -77.0);
  write_norms(entries, partial.data(), out, nullptr);
}

// runs: columns of y, first column and columns of the run
void output_variances(const double* const* sums, const int64_t* runs, int64_t count, double* out) {
  std::vector<VarianceEntry> entries;
  for (int64_t i = 0; i < count; ++i) entries.push_back({sums[i], runs[3 * i], runs[3 * i + 1], runs[3 * i + 2]});
  write_variances(entries, out, nullptr);
}

// Per matrix: to, from; ldt, lds, rows, columns, kept rows, kept columns, bytes of an element.
void resize_ranks(const void* const* pointers, const int64_t* sizes, int64_t count) {
  std::vector<CopyEntry> entries;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* s = sizes + 7 * i;
    entries.push_back({const_cast<void*>(pointers[2 * i]), pointers[2 * i + 1], s[0], s[1], s[2], s[3], s[4], s[5],
                       static_cast<int32_t>(s[6])});
  }
  copy_all(entries, nullptr);
}

void philox_signs(const int64_t* seed, unsigned step, unsigned first, unsigned tag, const int64_t* counts,
                  int64_t groups, float* out) {
  write_signs(std::vector<int64_t>(counts, counts + groups), {seed, step, first, tag}, out, nullptr);
}
}

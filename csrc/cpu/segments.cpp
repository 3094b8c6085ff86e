// Which rows of a mixed batch belong to which adapter: one stable counting sort per batch, and its tiles of rows.
#include "cpu/checks.h"

namespace fastlora {
namespace {

struct Run {
  int64_t first = 0, last = -1, count = 0;

  bool contiguous() const { return last - first + 1 == count; }
};

void check_ids(const Tensor& ids, int64_t adapters) {
  STD_TORCH_CHECK(ids.dim() == 1 && ids.scalar_type() == ScalarType::Long, "ids has ", ids.dim(),
                  " dimensions and dtype ", ids.scalar_type(), "; a Long vector with one id per row is needed");
  STD_TORCH_CHECK(adapters >= 0 && adapters < (int64_t{1} << 31), "adapters is ", adapters,
                  "; accepted: 0 to 2^31 - 1");
}

// First and last row and the number of rows of every adapter; the base-only rows are the last entry.
std::vector<Run> find_runs(const int64_t* ids, int64_t rows, int64_t adapters) {
  std::vector<Run> runs(static_cast<size_t>(adapters) + 1);
  for (int64_t m = 0; m < rows;) {
    const int64_t id = ids[m], begin = m;
    STD_TORCH_CHECK(id >= -1 && id < adapters, "ids[", m, "] is ", id, "; accepted: 0 to ", adapters - 1,
                    " (an adapter) and -1 (base only)");
    while (m < rows && ids[m] == id) ++m;
    Run& run = runs[static_cast<size_t>(id < 0 ? adapters : id)];
    if (run.count == 0) run.first = begin;
    run.last = m - 1;
    run.count += m - begin;
  }
  return runs;
}

void sort_rows(const int64_t* ids, int64_t rows, const std::vector<Run>& runs, int64_t* order, int64_t* ranges) {
  const size_t base = runs.size() - 1;
  std::vector<int64_t> next(runs.size());
  int64_t begin = 0;
  for (size_t g = 0; g <= base; ++g) {
    next[g] = begin;
    if (g < base) {
      ranges[2 * g] = runs[g].count ? begin : 0;
      ranges[2 * g + 1] = runs[g].count ? begin + runs[g].count : 0;
    }
    begin += runs[g].count;
  }
  for (int64_t m = 0; m < rows; ++m) order[next[ids[m] < 0 ? base : static_cast<size_t>(ids[m])]++] = m;
}

// order: rows sorted stably by adapter, base-only rows last, or empty if ranges can index the rows themselves
std::tuple<Tensor, Tensor> build_segments(const Tensor& ids_, int64_t adapters) {
  check_ids(ids_, adapters);
  const Tensor ids = ids_.is_contiguous() ? ids_ : torch::stable::contiguous(ids_);
  const int64_t rows = ids.numel();
  const int64_t* data = static_cast<const int64_t*>(ids.const_data_ptr());
  const std::vector<Run> runs = find_runs(data, rows, adapters);
  Tensor ranges = new_tensor({adapters, 2}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(ranges.mutable_data_ptr());
  if (std::all_of(runs.begin(), runs.end() - 1, [](const Run& run) { return run.contiguous(); })) {
    for (size_t g = 0; g + 1 < runs.size(); ++g) {
      to[2 * g] = runs[g].first;
      to[2 * g + 1] = runs[g].last + 1;
    }
    return {new_tensor({0}, ScalarType::Long), ranges};
  }
  Tensor order = new_tensor({rows}, ScalarType::Long);
  sort_rows(data, rows, runs, static_cast<int64_t*>(order.mutable_data_ptr()), to);
  return {order, ranges};
}

// tiles [ceil(rows / block) + adapters, 2]: (adapter, first position) of each tile, (-1, 0) once there are no more
Tensor segment_tiles(const Tensor& ranges_, int64_t rows, int64_t block) {
  STD_TORCH_CHECK(ranges_.dim() == 2 && ranges_.size(1) == 2 && ranges_.scalar_type() == ScalarType::Long,
                  "ranges has ", ranges_.dim(), " dimensions and dtype ", ranges_.scalar_type(),
                  "; a Long matrix [adapters, 2] is needed");
  STD_TORCH_CHECK(rows >= 0, "rows is ", rows, "; accepted: 0 or more");
  STD_TORCH_CHECK(block >= 1, "block is ", block, "; accepted: 1 or more");
  const Tensor ranges = ranges_.is_contiguous() ? ranges_ : torch::stable::contiguous(ranges_);
  const int64_t* range = static_cast<const int64_t*>(ranges.const_data_ptr());
  const int64_t adapters = ranges.size(0), count = rows / block + (rows % block != 0) + adapters;
  int64_t covered = 0;
  for (int64_t g = 0; g < adapters; ++g) {
    const int64_t begin = range[2 * g], end = range[2 * g + 1];
    STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= rows && end - begin <= rows - covered, "ranges[", g, "] is ",
                    begin, " to ", end, "; accepted: runs inside the ", rows, " rows, with no more rows in all");
    covered += end - begin;
  }
  const int64_t step = std::min(block, std::max<int64_t>(rows, 1));  // first + step cannot overflow
  Tensor tiles = new_tensor({count, 2}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(tiles.mutable_data_ptr());
  int64_t* const stop = to + 2 * count;
  for (int64_t g = 0; g < adapters; ++g) {
    for (int64_t first = range[2 * g]; first < range[2 * g + 1]; first += step, to += 2) {
      to[0] = g;
      to[1] = first;
    }
  }
  for (; to < stop; to += 2) {
    to[0] = -1;
    to[1] = 0;
  }
  return tiles;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("build_segments", TORCH_BOX(&fastlora::build_segments));
  m.impl("segment_tiles", TORCH_BOX(&fastlora::segment_tiles));
}

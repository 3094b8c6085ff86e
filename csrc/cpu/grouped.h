// What the two passes over many adapters in one batch share: which rows an adapter has, how they are split over
// threads, and how rows that lie anywhere are read and written.
#pragma once
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace fastlora {

// The rows of one adapter, or some of them: positions begin..end.
struct Segment {
  int64_t adapter, begin, end;
  int64_t partial = -1;  // index among the partial sums, where another part has rows of the same adapter
};

// Row `order[p]` is at position p; without an order, positions are rows.
struct Segments {
  Tensor order_tensor;
  const int64_t* order = nullptr;
  int64_t adapters = 0, covered = 0;
  std::vector<int64_t> rows;     // of every adapter
  std::vector<Segment> present;  // adapters that have rows, by their positions
};

inline Tensor read_indices(const Tensor& tensor, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == dimensions, name, " has dtype ",
                  tensor.scalar_type(), " and ", tensor.dim(), " dimensions; a Long tensor with ", dimensions,
                  " is needed");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_order(const int64_t* order, int64_t rows) {
  for (int64_t p = 0; p < rows; ++p) {
    STD_TORCH_CHECK(order[p] >= 0 && order[p] < rows, "order: row ", order[p], " at position ", p, "; x has ", rows);
  }
}

inline Segments read_segments(const Tensor& order, const Tensor& ranges_, int64_t rows) {
  Segments out;
  const Tensor ranges = read_indices(ranges_, "ranges", 2);
  STD_TORCH_CHECK(ranges.size(1) == 2, "ranges has ", ranges.size(1), " columns; begin and end are needed");
  out.order_tensor = read_indices(order, "order", 1);
  const int64_t length = order.size(0);
  STD_TORCH_CHECK(length == rows || length == 0, "order has ", length, " entries; accepted: 0, or the ", rows,
                  " rows of x");
  if (length > 0) {
    out.order = static_cast<const int64_t*>(out.order_tensor.const_data_ptr());
    check_order(out.order, rows);
  }
  out.adapters = ranges.size(0);
  const int64_t* range = static_cast<const int64_t*>(ranges.const_data_ptr());
  for (int64_t g = 0; g < out.adapters; ++g, range += 2) {
    STD_TORCH_CHECK(0 <= range[0] && range[0] <= range[1] && range[1] <= rows, "ranges: adapter ", g, " has positions ",
                    range[0], " to ", range[1], " of ", rows);
    out.rows.push_back(range[1] - range[0]);
    if (range[0] == range[1]) continue;
    out.present.push_back({g, range[0], range[1]});
    out.covered += range[1] - range[0];
  }
  std::sort(out.present.begin(), out.present.end(),
            [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < out.present.size(); ++i) {
    const Segment &a = out.present[i - 1], &b = out.present[i];
    STD_TORCH_CHECK(a.end <= b.begin, "ranges: adapters ", a.adapter, " and ", b.adapter, " overlap at position ",
                    b.begin);
  }
  return out;
}

// Every adapter's projections; `probes` is extra columns of h.
struct Adapters {
  std::vector<Group> groups;
  std::vector<int64_t> probes;

  int64_t width(int64_t g) const { return groups[g].rank + probes[g]; }
};

// One adapter's projections; starts[i] is the first column of projection i in h, as the layout of the layer has it.
inline Group read_adapter(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<double>& scales,
                          const int64_t* starts, const Places& places, int64_t g) {
  const size_t count = places.outputs.size(), first = static_cast<size_t>(g) * count;
  STD_TORCH_CHECK(starts[0] == 0, "starts: adapter ", g, " begins at ", starts[0], "; accepted: 0");
  Group group;
  group.slots.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &a = A[first + i], &b = B[first + i];
    check_operand(a, "A");
    check_operand(b, "B");
    const int64_t rank = starts[i + 1] - starts[i];
    STD_TORCH_CHECK(a.size(0) == rank && b.size(1) == rank, "A is ", a.size(0), " x ", a.size(1), " and B ", b.size(0),
                    " x ", b.size(1), " for adapter ", g, ", projection ", i, ", but its rank is ", rank,
                    " in the layout (starts)");
    add_projection(group, a, b, scales[first + i], places, i);
  }
  return group;
}

inline Adapters read_adapters(const std::vector<Tensor>& A, const std::vector<Tensor>& B, int64_t adapters,
                              std::vector<int64_t> probes, const std::vector<double>& scales,
                              const std::vector<int64_t>& starts, const Places& places) {
  const size_t count = places.outputs.size(), all = count * static_cast<size_t>(adapters);
  const size_t ends = all + static_cast<size_t>(adapters);
  STD_TORCH_CHECK(A.size() == all, "A has ", A.size(), " entries; ", adapters, " adapters of ", count,
                  " projections need ", all);
  check_entries(B.size(), "B", all, "A");
  check_entries(scales.size(), "scales", all, "A");
  STD_TORCH_CHECK(starts.size() == ends, "starts has ", starts.size(), " entries; ", adapters, " adapters of ", count,
                  " projections need ", ends);
  check_columns(places);
  Adapters out{{}, std::move(probes)};
  out.groups.reserve(static_cast<size_t>(adapters));
  for (int64_t g = 0; g < adapters; ++g) {
    const int64_t* own = starts.data() + static_cast<size_t>(g) * (count + 1);
    out.groups.push_back(read_adapter(A, B, scales, own, places, g));
  }
  return out;
}

// What the two passes know of a batch.
struct GroupedCall {
  Segments segments;
  Adapters adapters;

  int64_t rank(int64_t g) const { return adapters.groups[g].rank; }
  int64_t packed(int64_t g) const { return adapters.groups[g].packed; }
  // The largest of f(adapter) over the adapters with rows.
  template <class F>
  int64_t largest(const F& f) const {
    int64_t out = 0;
    for (const Segment& segment : segments.present) out = std::max(out, f(segment.adapter));
    return out;
  }
};

// Static split over threads by work. It depends only on the segments, the shapes and the thread count, so that results
// repeat bit by bit. An adapter whose rows lie in several parts has one partial sum in each.
struct Schedule {
  std::vector<std::vector<Segment>> parts;
  std::vector<Segment> shared;  // in the order of the partial sums

  // work[i] is that of one row of segments.present[i], in multiply-adds.
  Schedule(const Segments& segments, const std::vector<int64_t>& work) {
    constexpr int64_t kWorkPerThread = worth_a_thread(1 << 18);
    // Packing the factors and writing the gradients costs about as much as these rows.
    constexpr int64_t kFixedRows = 8;
    // Kernels take rows in tiles of divisors of this number.
    constexpr int64_t kStep = 12;
    int64_t total = 0;
    std::vector<int64_t> cost;
    for (size_t i = 0; i < segments.present.size(); ++i) {
      const int64_t rows = segments.present[i].end - segments.present[i].begin;
      cost.push_back(std::max<int64_t>(1, work[i] + work[i] * kFixedRows / rows));
      total += rows * cost.back();
    }
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t count = std::max<int64_t>(1, std::min({threads, total / kWorkPerThread, segments.covered / 8}));
    parts.resize(count);
    int64_t part = 0, before = 0;
    for (size_t i = 0; i < segments.present.size(); ++i) {
      const Segment& all = segments.present[i];
      const int64_t rows = all.end - all.begin;
      for (int64_t from = 0; from < rows;) {
        int64_t to = rows;
        if (part + 1 < count) to = std::min(rows, (total / count * (part + 1) - before) / cost[i] / kStep * kStep);
        if (to > from) parts[part].push_back({all.adapter, all.begin + from, all.begin + to});
        if (to < rows) ++part;
        from = std::max(from, to);
      }
      before += rows * cost[i];
    }
    for (auto& segments_of_part : parts) {
      for (Segment& segment : segments_of_part) {
        if (segment.end - segment.begin == segments.rows[segment.adapter]) continue;
        segment.partial = static_cast<int64_t>(shared.size());
        shared.push_back(segment);
      }
    }
  }

  // Calls f(its segments) for every part.
  template <class F>
  void run(const F& f) const {
    parallel_for(static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) f(parts[part]);
    });
  }
};

// Rows of a matrix: first, first + step, ... or those of an index.
struct Rows {
  const int64_t* index;
  int64_t first, step, count;

  int64_t at(int64_t i) const { return index ? index[i] : first + i * step; }
  Rows part(int64_t begin, int64_t end) const {
    return {index ? index + begin : nullptr, first + begin * step, step, end - begin};
  }
};

// The rows of a segment in runs: evenly spaced where there are many in a row, since the kernels take any stride, and
// else indexed, for rows that are copied to scratch memory and back.
template <class F>
void for_each_run(const int64_t* order, int64_t begin, int64_t end, const F& f) {
  if (order == nullptr) {
    f(Rows{nullptr, begin, 1, end - begin});
    return;
  }
  constexpr int64_t kLong = 12;
  int64_t scattered = begin;
  for (int64_t p = begin; p < end;) {
    const int64_t step = p + 1 < end ? order[p + 1] - order[p] : 1;
    int64_t stop = std::min(p + 2, end);
    while (stop < end && order[stop] - order[stop - 1] == step) ++stop;
    if (stop - p >= kLong) {
      if (scattered < p) f(Rows{order + scattered, 0, 0, p - scattered});
      f(Rows{nullptr, order[p], step, stop - p});
      scattered = p = stop;
    } else {
      // The last row may begin a run of another step.
      p = std::max(p + 1, stop == end ? end : stop - 1);
    }
  }
  if (scattered < end) f(Rows{order + scattered, 0, 0, end - scattered});
}

// The rows of a segment in blocks of nearly equal size.
template <class F>
void for_each_block(const int64_t* order, const Segment& segment, int64_t block, const F& f) {
  constexpr int64_t kStep = 12;
  for_each_run(order, segment.begin, segment.end, [&](const Rows& run) {
    const int64_t blocks = (run.count + block - 1) / block;
    const int64_t size = ((run.count + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
    for (int64_t m = 0; m < run.count; m += size) f(run.part(m, std::min(m + size, run.count)));
  });
}

// Rows that may lie anywhere as V: the data itself where that is possible, or a copy in the scratch memory.
template <class V, class T>
RowsOf<V> rows_as(const T* from, int64_t stride, const Rows& rows, int64_t columns, V* scratch) {
  if (rows.index == nullptr) {
    return rows_as(from + rows.first * stride, rows.step * stride, rows.count, columns, scratch);
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const T* row = from + rows.index[i] * stride;
    if constexpr (std::is_same_v<V, T>) {
      std::copy_n(row, columns, scratch + i * columns);
    } else {
      kernels().of<T>().widen(row, scratch + i * columns, columns);
    }
  }
  return {scratch, columns};
}

template <class T>
void expand_each(const float* s, int64_t lds, const Rows& rows, const float* b, int64_t ldb, int64_t rank,
                 int64_t columns, const Target& y, int64_t column) {
  // The columns of b that meet all rows of the block stay in the first-level cache.
  constexpr int64_t kFactors = 6144, kStep = 64;
  const int64_t strip = std::max(kFactors / rank / kStep, int64_t{1}) * kStep;
  for (int64_t n = 0; n < columns; n += strip) {
    for (int64_t i = 0; i < rows.count; ++i) {
      // The kernel fetches the row after its last one ahead: the stride tells it where that is.
      const int64_t next = i + 1 < rows.count ? rows.index[i + 1] - rows.index[i] : 0;
      kernels().of<T>().expand(s + i * lds, lds, 1, b + n, ldb, rank, std::min(strip, columns - n),
                               y.row<T>(rows.index[i]) + column + n, next * y.stride);
    }
  }
}

// y[rows, column..] += s b in place; scratch holds as many values.
template <class T>
void expand(const float* s, int64_t lds, const Rows& rows, const float* b, int64_t ldb, int64_t rank, int64_t columns,
            const Target& y, int64_t column, T* scratch) {
  if (rank == 0) return;
  const TypedKernels<T>& typed = kernels().of<T>();
  if (rows.index == nullptr) {
    typed.expand(s, lds, rows.count, b, ldb, rank, columns, y.row<T>(rows.first) + column, rows.step * y.stride);
    return;
  }
  // One row at a time is slower than a tile of rows; up to this rank copying rows there and back costs more.
  constexpr int64_t kLowRank = 16;
  if (rank <= kLowRank) {
    expand_each<T>(s, lds, rows, b, ldb, rank, columns, y, column);
    return;
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    std::copy_n(y.row<T>(rows.index[i]) + column, columns, scratch + i * columns);
  }
  typed.expand(s, lds, rows.count, b, ldb, rank, columns, scratch, columns);
  for (int64_t i = 0; i < rows.count; ++i) {
    std::copy_n(scratch + i * columns, columns, y.row<T>(rows.index[i]) + column);
  }
}

}  // namespace fastlora

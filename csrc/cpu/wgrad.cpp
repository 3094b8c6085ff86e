// Gradients of the adapters in one pass over row blocks, while dy and x are in cache:
// dh_i = scale_i dy_i B_i    dB_i = scale_i dy_i^T h_i    Q_i = dy_i^T h[:, rank:]    dA = dh^T x
// Behind the ranks h has `probes` columns for all projections, or as many for each.
#include "cpu/common.h"
#include "cpu/pack.h"

namespace fastlora {
namespace {

struct Projection {
  Matrix dy;
  int64_t rank, offset;
  int64_t factor;    // offset of scale * B^T, packed [rank, columns]
  int64_t gradient;  // offset of [rank + probes, columns] in the sums of a part
  float scale;
};

struct Problem {
  Matrix x, h;
  std::vector<Projection> projections;
  Scratch<float> factors{0};
  int64_t rank, probes, probe_stride = 0, widest = 0, gradients = 0;
  bool need_dA;
  // Sums of a part: dB and Q of every projection, then dA.
  int64_t sums() const { return gradients + (need_dA ? rank * x.columns : 0); }
};

Projection check_projection(const Problem& problem, const Tensor& dy, const Tensor& B, int64_t offset, double scale) {
  Projection it{read_matrix(dy, "dy"), 0, offset, 0, 0, static_cast<float>(scale)};
  check_matrix(B, "B");
  check_same_dtype(it.dy.dtype, "dy", problem.x.dtype, "x");
  check_same_dtype(B.scalar_type(), "B", problem.x.dtype, "x");
  it.rank = B.size(1);
  STD_TORCH_CHECK(it.dy.rows == problem.x.rows, "dy has ", it.dy.rows, " rows, but x has ", problem.x.rows);
  STD_TORCH_CHECK(B.size(0) == it.dy.columns, "B has ", B.size(0), " rows, but dy has ", it.dy.columns,
                  " columns (out_features)");
  STD_TORCH_CHECK(offset >= 0 && offset + it.rank <= problem.rank, "offsets: ranks ", offset, " to ", offset + it.rank,
                  " were asked for, but rank is ", problem.rank);
  return it;
}

Problem prepare(const Tensor& x, const std::vector<Tensor>& dy, const Tensor& h, const std::vector<Tensor>& B,
                const std::vector<int64_t>& offsets, const std::vector<double>& scales, int64_t rank, int64_t probes,
                bool need_dA) {
  STD_TORCH_CHECK(B.size() == dy.size(), "B has ", B.size(), " entries, but dy has ", dy.size());
  STD_TORCH_CHECK(offsets.size() == dy.size(), "offsets has ", offsets.size(), " entries, but dy has ", dy.size());
  STD_TORCH_CHECK(scales.size() == dy.size(), "scales has ", scales.size(), " entries, but dy has ", dy.size());
  STD_TORCH_CHECK(rank >= 0, "rank is ", rank, "; accepted: 0 or more");
  STD_TORCH_CHECK(probes >= 0, "probes is ", probes, "; accepted: 0 or more");
  Problem out{read_matrix(x, "x"), read_matrix(h, "h"), {}, Scratch<float>(0), rank, probes, 0, 0, 0, need_dA};
  check_same_dtype(out.h.dtype, "h", out.x.dtype, "x");
  STD_TORCH_CHECK(out.h.rows == out.x.rows, "h has ", out.h.rows, " rows, but x has ", out.x.rows);
  out.probe_stride = probe_stride(out.h.columns - rank, probes, dy.size());
  STD_TORCH_CHECK(out.h.columns == rank + probes || out.probe_stride > 0, "h has ", out.h.columns,
                  " columns; rank + probes is ", rank + probes);
  int64_t packed = 0;
  for (size_t i = 0; i < dy.size(); ++i) {
    Projection it = check_projection(out, dy[i], B[i], offsets[i], scales[i]);
    it.factor = packed;
    it.gradient = out.gradients;
    packed += it.rank * it.dy.columns;
    out.gradients += (it.rank + probes) * it.dy.columns;
    out.widest = std::max(out.widest, it.dy.columns);
    out.projections.push_back(std::move(it));
  }
  out.factors = Scratch<float>(packed);
  for (size_t i = 0; i < dy.size(); ++i) {
    const Projection& it = out.projections[i];
    pack(B[i], it.scale, B[i].scalar_type(), out.factors.get() + it.factor, true);
  }
  return out;
}

template <class T>
void run_part(const Problem& problem, int64_t begin, int64_t end, float* dh, float* sums) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const int64_t depth = problem.x.columns, rank = problem.rank, probes = problem.probes, width = problem.h.columns;
  const int64_t block = block_rows(std::max(problem.widest, depth));
  const Scratch<float> wide(kNarrow ? block * std::max(problem.widest, depth) : 0);
  const Scratch<float> wide_h(kNarrow ? block * width : 0), met(block * width);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    const Matrix &x = problem.x, &h = problem.h;
    const float* h_rows = rows_as_float(h.data<T>() + m * h.stride, h.stride, rows, width, wide_h.get());
    int64_t first_probe = rank - problem.probe_stride;
    for (const Projection& it : problem.projections) {
      first_probe += problem.probe_stride;
      const int64_t columns = it.dy.columns, stride = float_stride<T>(it.dy.stride, columns);
      const float* dy = rows_as_float(it.dy.data<T>() + m * it.dy.stride, it.dy.stride, rows, columns, wide.get());
      kernels().dot(dy, stride, rows, problem.factors.get() + it.factor, columns, it.rank, columns,
                    dh + m * rank + it.offset, rank);
      gather(h_rows, float_stride<T>(h.stride, width), rows, it.offset, it.rank, first_probe, probes, met.get());
      kernels().outer(met.get(), it.rank + probes, it.rank + probes, dy, stride, rows, columns, sums + it.gradient,
                      columns);
    }
    if (problem.need_dA) {
      const float* data = rows_as_float(x.data<T>() + m * x.stride, x.stride, rows, depth, wide.get());
      kernels().outer(dh + m * rank, rank, rank, data, float_stride<T>(x.stride, depth), rows, depth,
                      sums + problem.gradients, depth);
    }
  }
}

bool covers_all(const Problem& problem) {
  std::vector<char> covered(static_cast<size_t>(problem.rank), 0);
  for (const Projection& it : problem.projections) std::fill_n(covered.begin() + it.offset, it.rank, char{1});
  return std::find(covered.begin(), covered.end(), char{0}) == covered.end();
}

using Result = std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

Result wgrad(const Tensor& x, const std::vector<Tensor>& dy, const Tensor& h, const std::vector<Tensor>& B,
             const std::vector<int64_t>& offsets, const std::vector<double>& scales, int64_t rank, int64_t probes,
             bool need_dA) {
  const Problem problem = prepare(x, dy, h, B, offsets, scales, rank, probes, need_dA);
  const int64_t rows = problem.x.rows, depth = problem.x.columns, size = problem.sums();
  Tensor dh = new_tensor({rows, rank}, ScalarType::Float, !covers_all(problem));
  Tensor dA = new_tensor({need_dA ? rank : 0, depth}, ScalarType::Float);
  float* dh_data = static_cast<float*>(dh.mutable_data_ptr());
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(rows, 2 * (problem.gradients + rank * depth));
  const Scratch<float> sums(parts.count * size);
  std::fill_n(sums.get(), parts.count * size, 0.0f);
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    float* mine = sums.get() + part * size;
    with_type(problem.x.dtype, [&](auto type) { run_part<decltype(type)>(problem, begin, end, dh_data, mine); });
  });
  add_parts(sums.get(), size, parts.count);
  std::vector<Tensor> dB, Q;
  for (const Projection& it : problem.projections) {
    const int64_t columns = it.dy.columns;
    const float* gradient = sums.get() + it.gradient;
    dB.push_back(new_tensor({columns, it.rank}, ScalarType::Float));
    Q.push_back(new_tensor({columns, probes}, ScalarType::Float));
    transpose(gradient, it.rank, columns, it.scale, static_cast<float*>(dB.back().mutable_data_ptr()));
    transpose(gradient + it.rank * columns, probes, columns, 1.0f, static_cast<float*>(Q.back().mutable_data_ptr()));
  }
  if (need_dA) std::copy_n(sums.get() + problem.gradients, rank * depth, static_cast<float*>(dA.mutable_data_ptr()));
  return {dh, dA, dB, Q};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("wgrad", TORCH_BOX(&fastlora::wgrad)); }

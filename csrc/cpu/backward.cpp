// The backward of a group in one pass over row blocks, after the frozen matmul has written dy W into dx:
// dh_i = scale_i dy_i B_i    dB_i = scale_i dy_i^T h_i    Q_i = dy_i^T h_P    dA = dh^T x    dx += dh A
// h_P are the columns of h after the ranks: the same for every projection, or a run for each.
#include "cpu/group.h"

namespace fastlora {
namespace {

struct Pass {
  Matrix x, h;
  std::vector<Matrix> dy;
  std::optional<Target> dx;
  Group group;
  Scratch<float> A{0}, B{0};
  Scratch<bf16> B_pairs{0};              // B^T without the scale, which is not exact in bf16
  int64_t probes = 0, probe_stride = 0;  // from the probes of one projection to those of the next
  bool need_dA = false, need_dB = false;
  std::vector<int64_t> gradient;  // of [rank + probes, columns] of every projection in the sums of a part
  int64_t first_dA = 0, sums = 0;
  int64_t met(const Slot& it) const { return (need_dB ? it.rank : 0) + probes; }
  int64_t first_probe(size_t i) const { return group.rank + static_cast<int64_t>(i) * probe_stride; }
};

// As run_slots below, on products of bf16 pairs.
void run_slots_in_pairs(const Pass& pass, int64_t m, int64_t rows, bf16* met, float* dh, float* sums) {
  const int64_t rank = pass.group.rank;
  const bf16* h = pass.h.data<bf16>() + m * pass.h.stride;
  for (size_t i = 0; i < pass.group.slots.size(); ++i) {
    const Slot& it = pass.group.slots[i];
    if (it.output < 0) continue;
    const Matrix& from = pass.dy[it.output];
    const bf16* dy = from.data<bf16>() + m * from.stride + it.column;
    const int64_t count = pass.met(it);
    kernels().dot_bf16(dy, from.stride, rows, pass.B_pairs.get() + it.packed, it.columns, it.rank, it.columns,
                       dh + it.offset, rank);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t r = 0; r < it.rank; ++r) dh[row * rank + it.offset + r] *= it.scale;
    }
    gather(h, pass.h.stride, rows, it.offset, pass.need_dB ? it.rank : 0, pass.first_probe(i), pass.probes, met);
    kernels().outer_bf16(met, count, count, dy, from.stride, rows, it.columns, sums + pass.gradient[i], it.columns);
  }
}

// dh, and what dy meets: dB and Q of every projection.
template <class T>
void run_slots(const Pass& pass, int64_t m, int64_t rows, float* wide, float* wide_h, float* met, float* dh,
               float* sums) {
  const int64_t rank = pass.group.rank, width = pass.h.columns;
  const float* h = rows_as_float(pass.h.data<T>() + m * pass.h.stride, pass.h.stride, rows, width, wide_h);
  for (size_t i = 0; i < pass.group.slots.size(); ++i) {
    const Slot& it = pass.group.slots[i];
    if (it.output < 0) continue;
    const Matrix& from = pass.dy[it.output];
    const float* dy = rows_as_float(from.data<T>() + m * from.stride + it.column, from.stride, rows, it.columns, wide);
    const int64_t stride = float_stride<T>(from.stride, it.columns), count = pass.met(it);
    kernels().dot(dy, stride, rows, pass.B.get() + it.packed, it.columns, it.rank, it.columns, dh + it.offset, rank);
    gather(h, float_stride<T>(pass.h.stride, width), rows, it.offset, pass.need_dB ? it.rank : 0, pass.first_probe(i),
           pass.probes, met);
    kernels().outer(met, count, count, dy, stride, rows, it.columns, sums + pass.gradient[i], it.columns);
  }
}

template <class T>
void run_rows(const Pass& pass, int64_t begin, int64_t end, int64_t block, int64_t widest, float* sums) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const int64_t depth = pass.x.columns, rank = pass.group.rank, width = pass.h.columns;
  const Scratch<float> wide(kNarrow ? block * widest : 0), wide_h(kNarrow ? block * width : 0);
  const bool pairs = std::is_same_v<T, bf16> && kernels().dot_bf16;
  const Scratch<float> met(pairs ? 0 : block * width), dh(block * rank);
  const Scratch<bf16> met_pairs(pairs ? block * width : 0);
  // Projections without a gradient contribute nothing.
  std::fill_n(dh.get(), block * rank, 0.0f);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    if (pairs) {
      run_slots_in_pairs(pass, m, rows, met_pairs.get(), dh.get(), sums);
    } else {
      run_slots<T>(pass, m, rows, wide.get(), wide_h.get(), met.get(), dh.get(), sums);
    }
    if (rank == 0) continue;
    if (pass.need_dA) {
      const float* x = rows_as_float(pass.x.data<T>() + m * pass.x.stride, pass.x.stride, rows, depth, wide.get());
      kernels().outer(dh.get(), rank, rank, x, float_stride<T>(pass.x.stride, depth), rows, depth, sums + pass.first_dA,
                      depth);
    }
    if (pass.dx) {
      kernels().of<T>().expand(dh.get(), rank, rows, pass.A.get(), depth, rank, depth, pass.dx->row<T>(m),
                               pass.dx->stride);
    }
  }
}

// Sums over all rows: dB and Q of every projection, then dA.
Scratch<float> run(const Pass& pass) {
  int64_t widest = pass.x.columns;
  for (const Slot& it : pass.group.slots) widest = std::max(widest, it.columns);
  const int64_t block = block_rows(widest), depth = pass.x.columns;
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(pass.x.rows, 2 * (pass.group.packed + pass.group.rank * depth));
  Scratch<float> sums(parts.count * pass.sums);
  std::fill_n(sums.get(), parts.count * pass.sums, 0.0f);
  with_type(pass.x.dtype, [&](auto type) {
    parts.run([&](int64_t part, int64_t begin, int64_t end) {
      run_rows<decltype(type)>(pass, begin, end, block, widest, sums.get() + part * pass.sums);
    });
  });
  add_parts(sums.get(), pass.sums, parts.count);
  return sums;
}

Tensor new_transposed(const float* from, int64_t rank, int64_t columns, float scale, ScalarType dtype) {
  Tensor out = new_tensor({columns, rank}, dtype);
  if (dtype == ScalarType::Float) {
    transpose(from, rank, columns, scale, static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }
  const Scratch<float> wide(columns * rank);
  transpose(from, rank, columns, scale, wide.get());
  write_as(dtype, wide.get(), columns * rank, out);
  return out;
}

void read_inputs(Pass& pass, const std::vector<Tensor>& dy, const Tensor& h, std::optional<Tensor>& dx) {
  const Matrix& x = pass.x;
  for (const Tensor& grad : dy) {
    pass.dy.push_back(read_matrix(grad, "dy"));
    check_same_dtype(pass.dy.back().dtype, "dy", x.dtype, "x");
    STD_TORCH_CHECK(pass.dy.back().rows == x.rows, "dy has ", pass.dy.back().rows, " rows, but x has ", x.rows);
  }
  pass.h = read_matrix(h, "h");
  check_same_dtype(pass.h.dtype, "h", x.dtype, "x");
  STD_TORCH_CHECK(pass.h.rows == x.rows, "h has ", pass.h.rows, " rows, but x has ", x.rows);
  if (!dx) return;
  pass.dx = write_target(*dx, "dx", x.rows, x.dtype);
  STD_TORCH_CHECK(pass.dx->columns == x.columns, "dx has ", pass.dx->columns, " columns, but x has ", x.columns);
}

using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

Result collect(const Pass& pass, const float* sums, const std::vector<Tensor>& A, const std::vector<Tensor>& B) {
  std::vector<Tensor> dA, dB, Q;
  const int64_t depth = pass.x.columns;
  for (size_t i = 0; i < A.size(); ++i) {
    const Slot& it = pass.group.slots[i];
    const float* gradient = sums + pass.gradient[i];
    if (pass.need_dA) {
      dA.push_back(new_tensor({it.rank, depth}, A[i].scalar_type()));
      write_as(A[i].scalar_type(), sums + pass.first_dA + it.offset * depth, it.rank * depth, dA.back());
    }
    if (pass.need_dB) dB.push_back(new_transposed(gradient, it.rank, it.columns, it.scale, B[i].scalar_type()));
    gradient += (pass.need_dB ? it.rank : 0) * it.columns;
    if (pass.probes > 0) Q.push_back(new_transposed(gradient, pass.probes, it.columns, 1.0f, ScalarType::Float));
  }
  return {dA, dB, Q};
}

Result lora_backward_(std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                      const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                      const std::vector<int64_t>& columns, const std::vector<double>& scales, int64_t probes,
                      bool need_dA, bool need_dB) {
  Pass pass;
  pass.x = read_matrix(x, "x");
  pass.probes = probes, pass.need_dA = need_dA, pass.need_dB = need_dB;
  read_inputs(pass, dy, h, dx);
  std::vector<int64_t> widths;
  for (const Matrix& grad : pass.dy) widths.push_back(grad.columns);
  pass.group = read_group(A, B, outputs, columns, scales, pass.x.columns, widths);
  STD_TORCH_CHECK(probes >= 0, "probes is ", probes, "; accepted: 0 or more");
  STD_TORCH_CHECK(pass.h.columns >= pass.group.rank + probes, "h has ", pass.h.columns, " columns; rank + probes is ",
                  pass.group.rank + probes);
  pass.probe_stride = probe_stride(pass.h.columns - pass.group.rank, probes, A.size());
  for (const Slot& it : pass.group.slots) {
    pass.gradient.push_back(pass.sums);
    pass.sums += pass.met(it) * it.columns;
  }
  pass.first_dA = pass.sums;
  if (need_dA) pass.sums += pass.group.rank * pass.x.columns;
  const bool pairs = pass.x.dtype == ScalarType::BFloat16 && kernels().dot_bf16;
  pass.B = pack_B(pass.group, B, pass.x.dtype, !pairs);
  pass.B_pairs = pack_pairs(pass.B, pass.group.packed, pass.x.dtype);
  if (pass.dx) pass.A = pack_A(pass.group, A, std::nullopt, pass.x.columns, pass.x.dtype);
  const Scratch<float> sums = run(pass);
  return collect(pass, sums.get(), A, B);
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("lora_backward_", TORCH_BOX(&fastlora::lora_backward_)); }

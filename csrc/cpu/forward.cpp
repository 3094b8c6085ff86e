// The forward of a group in one pass over row blocks, after the frozen matmul:
// h = x [A; P]^T, or [x A^T, x[:, P]] where P are columns of x, then y_j[:, columns_i] += scale_i h_i B_i^T in place,
// and the column moments of y
#include "cpu/group.h"

namespace fastlora {
namespace {

struct Pass {
  Matrix x;
  std::vector<Target> y;
  Group group;
  Scratch<float> A, B;
  Scratch<bf16> A_pairs;
  int64_t width;                // columns of h
  std::vector<int64_t> picked;  // columns of x that are the last ones of h
  std::vector<int64_t> first;   // of the moments of y_j in the sums of a part
  int64_t sums = 0;             // doubles that a part adds up; 0 without moments
};

// s = x [A; P]^T in fp32, columns that are picked left as they are
template <class T>
void shrink_rows(const Pass& pass, int64_t m, int64_t rows, float* wide, float* s) {
  const int64_t depth = pass.x.columns, width = pass.width;
  const int64_t count = width - static_cast<int64_t>(pass.picked.size());
  const T* rows_of_x = pass.x.data<T>() + m * pass.x.stride;
  if constexpr (std::is_same_v<T, bf16>) {
    if (kernels().dot_bf16) {
      kernels().dot_bf16(rows_of_x, pass.x.stride, rows, pass.A_pairs.get(), depth, count, depth, s, width);
      return;
    }
  }
  const float* x = rows_as_float(rows_of_x, pass.x.stride, rows, depth, wide);
  kernels().dot(x, float_stride<T>(pass.x.stride, depth), rows, pass.A.get(), depth, count, depth, s, width);
}

// The columns of x that are columns of h, as they are.
template <class T>
void pick_rows(const Pass& pass, int64_t m, int64_t rows, T* h) {
  const int64_t count = static_cast<int64_t>(pass.picked.size());
  for (int64_t row = m; count && row < m + rows; ++row) {
    const T* x = pass.x.data<T>() + row * pass.x.stride;
    T* out = h + (row + 1) * pass.width - count;
    for (int64_t i = 0; i < count; ++i) out[i] = x[pass.picked[i]];
  }
}

template <class T>
void run_rows(const Pass& pass, int64_t begin, int64_t end, int64_t block, T* h, double* sums) {
  constexpr bool kNarrow = !std::is_same_v<T, float>;
  const int64_t depth = pass.x.columns, width = pass.width;
  const TypedKernels<T>& typed = kernels().of<T>();
  const Scratch<float> wide(kNarrow ? block * depth : 0), wide_h(kNarrow ? block * width : 0);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    float* s = nullptr;
    if constexpr (kNarrow) {
      s = wide_h.get();
    } else {
      s = h + m * width;
    }
    shrink_rows<T>(pass, m, rows, wide.get(), s);
    if constexpr (kNarrow) typed.narrow(s, h + m * width, rows * width);
    pick_rows<T>(pass, m, rows, h);
    for (const Slot& it : pass.group.slots) {
      if (it.rank == 0) continue;
      const Target& y = pass.y[it.output];
      typed.expand(s + it.offset, width, rows, pass.B.get() + it.packed, it.columns, it.rank, it.columns,
                   y.row<T>(m) + it.column, y.stride);
    }
    for (size_t j = 0; sums && j < pass.y.size(); ++j) {
      double* mine = sums + pass.first[j];
      const int64_t columns = pass.y[j].columns;
      typed.moments(pass.y[j].row<T>(m), pass.y[j].stride, rows, columns, mine, mine + columns);
    }
  }
}

void run(const Pass& pass, Tensor& h, std::vector<Tensor>& moments) {
  int64_t widest = pass.x.columns;
  for (const Target& y : pass.y) widest = std::max(widest, y.columns);
  const int64_t block = block_rows(widest);
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(pass.x.rows, 2 * (pass.group.packed + pass.group.rank * pass.x.columns));
  const Scratch<double> partial(parts.count * pass.sums);
  std::fill_n(partial.get(), parts.count * pass.sums, 0.0);
  with_type(pass.x.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(h.mutable_data_ptr());
    parts.run([&](int64_t part, int64_t begin, int64_t end) {
      run_rows<T>(pass, begin, end, block, out, pass.sums ? partial.get() + part * pass.sums : nullptr);
    });
  });
  for (size_t j = 0; j < moments.size(); ++j) {
    double* out = static_cast<double*>(moments[j].mutable_data_ptr());
    for (int64_t i = 0; i < 2 * pass.y[j].columns; ++i) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts.count; ++part) sum += partial.get()[part * pass.sums + pass.first[j] + i];
      out[i] = sum;
    }
  }
}

// Columns of x by number, of a contiguous int64 matrix [projections, k].
std::vector<int64_t> read_columns(const Tensor& P, int64_t depth) {
  check_matrix(P, "P");
  STD_TORCH_CHECK(P.is_contiguous(), "P names columns of x and is not contiguous");
  const int64_t* data = static_cast<const int64_t*>(P.const_data_ptr());
  std::vector<int64_t> columns(data, data + P.size(0) * P.size(1));
  for (const int64_t column : columns) {
    STD_TORCH_CHECK(column >= 0 && column < depth, "P names column ", column, "; x has ", depth, " (in_features)");
  }
  return columns;
}

std::tuple<Tensor, std::vector<Tensor>> lora_forward_(std::vector<Tensor> y, const Tensor& x_,
                                                      const std::vector<Tensor>& A, const std::optional<Tensor>& P,
                                                      const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                                                      const std::vector<int64_t>& columns,
                                                      const std::vector<double>& scales, bool moments) {
  Pass pass{read_matrix(x_, "x"), {}, {}, Scratch<float>(0), Scratch<float>(0), Scratch<bf16>(0), 0, {}, {}};
  const Matrix& x = pass.x;
  std::vector<int64_t> widths;
  for (Tensor& target : y) {
    pass.y.push_back(write_target(target, "y", x.rows, x.dtype));
    widths.push_back(pass.y.back().columns);
    pass.first.push_back(pass.sums);
    if (moments) pass.sums += 2 * widths.back();
  }
  pass.group = read_group(A, B, outputs, columns, scales, x.columns, widths);
  for (const Slot& it : pass.group.slots) STD_TORCH_CHECK(it.output >= 0, "outputs: -1 is for the backward only");
  const bool picks = P && P->scalar_type() == ScalarType::Long;
  if (picks) {
    pass.picked = read_columns(*P, x.columns);
  } else if (P) {
    check_operand(*P, "P");
    STD_TORCH_CHECK(P->size(1) == x.columns, "P has ", P->size(1), " columns, but x has ", x.columns, " (in_features)");
  }
  const int64_t multiplied = pass.group.rank + (P && !picks ? P->size(0) : 0);
  pass.width = multiplied + static_cast<int64_t>(pass.picked.size());
  pass.A = pack_A(pass.group, A, picks ? std::nullopt : P, x.columns, x.dtype);
  pass.A_pairs = pack_pairs(pass.A, multiplied * x.columns, x.dtype);
  pass.B = pack_B(pass.group, B, x.dtype);
  Tensor h = new_tensor({x.rows, pass.width}, x.dtype);
  std::vector<Tensor> result;
  for (size_t j = 0; moments && j < y.size(); ++j) result.push_back(new_tensor({2, widths[j]}, ScalarType::Double));
  run(pass, h, result);
  return {h, result};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("lora_forward_", TORCH_BOX(&fastlora::lora_forward_)); }

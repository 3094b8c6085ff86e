// The products of one adapter one at a time, for what comes between them, such as dropout: shrink, expand_, wgrad and
// outer.
#include "cpu/backward.h"

namespace fastlora {
namespace {

template <class T, class V>
void shrink_rows(const Matrix& x, const Matrix& A, T* h) {
  const int64_t depth = x.columns, rank = A.rows, block = block_rows(depth);
  const Scratch<V> A_rows(scratch_for<V, T>(rank * depth));
  const RowsOf<V> a = rows_as(A.row<T>(0), A.stride, rank, depth, A_rows.get());
  Parts(x.rows, depth * rank).run([&](int64_t, int64_t begin, int64_t end) {
    const Scratch<V> x_rows(scratch_for<V, T>(block * depth));
    const Scratch<float> h_as_fp32(scratch_for<float, T>(block * rank));
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      const RowsOf<V> some = rows_as(x.row<T>(m), x.stride, rows, depth, x_rows.get());
      if constexpr (std::is_same_v<T, float>) {
        dot(some, rows, a, rank, depth, h + m * rank, rank);
      } else {
        dot(some, rows, a, rank, depth, h_as_fp32.get(), rank);
        kernels().of<T>().narrow(h_as_fp32.get(), h + m * rank, rows * rank);
      }
    }
  });
}

Tensor shrink(const Tensor& x_, const Tensor& A_) {
  const Matrix x = read_matrix(x_, "x"), A = read_matrix(A_, "A");
  check_same_dtype(A.dtype, "A", x.dtype, "x");
  STD_TORCH_CHECK(A.columns == x.columns, "A has ", A.columns, " columns, but x has ", x.columns, " (in_features)");
  Tensor h = new_tensor({x.rows, A.rows}, x.dtype);
  if (x.rows == 0 || A.rows == 0) return h;
  with_types(x.dtype, [&](auto type, auto multiplied) {
    using T = decltype(type);
    shrink_rows<T, decltype(multiplied)>(x, A, static_cast<T*>(h.mutable_data_ptr()));
  });
  return h;
}

void check_dtype_of_y(ScalarType dtype, const char* name, ScalarType of_y) {
  check_dtype(dtype, name);
  STD_TORCH_CHECK(dtype == of_y || dtype == ScalarType::Float, name, " has dtype ", dtype, ", but y has ", of_y,
                  "; accepted: the dtype of y, or Float");
}

// Projections by their factors scale_i B_i^T [rank, columns].
Group read_factors(const std::vector<Tensor>& factors, const std::vector<int64_t>& offsets,
                   const std::vector<int64_t>& columns, const std::vector<double>& scales, const Target& y,
                   ScalarType dtype, int64_t total_rank) {
  check_entries(offsets.size(), "offsets", factors.size(), "factors");
  check_entries(columns.size(), "columns", factors.size(), "factors");
  check_entries(scales.size(), "scales", factors.size(), "factors");
  Group group;
  for (size_t i = 0; i < factors.size(); ++i) {
    check_matrix(factors[i], "factors");
    check_dtype_of_y(factors[i].scalar_type(), "factors", dtype);
    const Slot slot{factors[i].size(0), factors[i].size(1), offsets[i], 0, columns[i], static_cast<float>(scales[i])};
    STD_TORCH_CHECK(slot.offset >= 0 && slot.offset + slot.rank <= total_rank, "offsets: columns ", slot.offset, " to ",
                    slot.offset + slot.rank, " of h were asked for, but it has ", total_rank);
    STD_TORCH_CHECK(slot.column >= 0 && slot.column + slot.columns <= y.columns, "columns: ", slot.column, " to ",
                    slot.column + slot.columns, " of y were asked for, but it has ", y.columns);
    group.add(slot);
  }
  return group;
}

Scratch<float> pack_factors(const Group& group, const std::vector<Tensor>& factors) {
  Scratch<float> out(group.packed);
  for (size_t i = 0; i < factors.size(); ++i) {
    const Slot& slot = group.slots[i];
    float* to = out.get() + slot.packed;
    pack(factors[i], factors[i].scalar_type(), to);
    if (slot.scale == 1.0f) continue;
    for (int64_t e = 0; e < slot.rank * slot.columns; ++e) to[e] *= slot.scale;
  }
  return out;
}

// T is the type of y, H that of h.
template <class T, class H>
void expand_rows(const Target& y, const Matrix& h, const Group& group, const float* packed, double* sums) {
  const Parts parts(h.rows, y.columns * 8);
  const int64_t block = block_rows(y.columns), count = sums ? 2 * y.columns : 0;
  const TypedKernels<T>& typed = kernels().of<T>();
  const Scratch<double> partial(parts.count * count);
  std::fill_n(partial.get(), parts.count * count, 0.0);
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    const Scratch<float> h_as_fp32(scratch_for<float, H>(block * h.columns));
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      const auto [s, lds] = rows_as(h.row<H>(m), h.stride, rows, h.columns, h_as_fp32.get());
      for (const Slot& slot : group.slots) {
        if (slot.rank == 0) continue;
        typed.expand(s + slot.offset, lds, rows, packed + slot.packed, slot.columns, slot.rank, slot.columns,
                     y.row<T>(m) + slot.column, y.stride);
      }
      if (sums) {
        double* to = partial.get() + part * count;
        typed.moments(y.row<T>(m), y.stride, rows, y.columns, to, to + y.columns);
      }
    }
  });
  for (int64_t part = 0; part < parts.count; ++part) {
    for (int64_t i = 0; i < count; ++i) sums[i] += partial.get()[part * count + i];
  }
}

Tensor expand_(Tensor y_, const Tensor& h_, const std::vector<Tensor>& factors, const std::vector<int64_t>& offsets,
               const std::vector<int64_t>& columns, const std::vector<double>& scales, bool moments) {
  check_matrix(y_, "y");
  const ScalarType dtype = y_.scalar_type();
  check_dtype(dtype, "y");
  check_unit_columns(y_, "y");
  check_dtype_of_y(h_.scalar_type(), "h", dtype);
  const Matrix h = read_matrix(h_, "h");
  check_rows(h.rows, "h", y_.size(0), "y");
  const Target y{y_.mutable_data_ptr(), h.rows, y_.size(1), y_.stride(0)};
  const Group group = read_factors(factors, offsets, columns, scales, y, dtype, h.columns);
  const Scratch<float> packed = pack_factors(group, factors);
  Tensor result = moments ? new_tensor({2, y.columns}, ScalarType::Double, true) : new_tensor({0}, ScalarType::Double);
  double* sums = moments ? static_cast<double*>(result.mutable_data_ptr()) : nullptr;
  if (h.rows == 0 || y.columns == 0) return result;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (h.dtype == ScalarType::Float) {
      expand_rows<T, float>(y, h, group, packed.get(), sums);
    } else {
      expand_rows<T, T>(y, h, group, packed.get(), sums);
    }
  });
  return result;
}

// Projection i is the whole of dy_i; its ranks lie where `offsets` say.
BackwardCall read_wgrad(const Tensor& x, const std::vector<Tensor>& dy, const Tensor& h, const std::vector<Tensor>& B,
                        const std::vector<int64_t>& offsets, const std::vector<double>& scales, int64_t rank,
                        int64_t probes, bool need_dA) {
  check_entries(B.size(), "B", dy.size(), "dy");
  check_entries(offsets.size(), "offsets", dy.size(), "dy");
  check_entries(scales.size(), "scales", dy.size(), "dy");
  check_not_negative(rank, "rank");
  check_not_negative(probes, "probes");
  std::optional<Tensor> no_dx;
  BackwardCall call{read_inputs(x, h, dy, no_dx), {}, {}, {}, probes};
  call.need_dA = need_dA, call.need_dB = true;
  call.group.rank = rank;
  for (size_t i = 0; i < dy.size(); ++i) {
    check_matrix(B[i], "B");
    check_same_dtype(B[i].scalar_type(), "B", call.x.dtype, "x");
    const int64_t columns = call.widths[i], output = static_cast<int64_t>(i);
    const Slot slot{B[i].size(1), columns, offsets[i], output, 0, static_cast<float>(scales[i])};
    STD_TORCH_CHECK(B[i].size(0) == columns, "B has ", B[i].size(0), " rows, but dy has ", columns,
                    " columns (out_features)");
    STD_TORCH_CHECK(slot.offset >= 0 && slot.offset + slot.rank <= rank, "offsets: ranks ", slot.offset, " to ",
                    slot.offset + slot.rank, " were asked for, but rank is ", rank);
    call.group.add(slot);
  }
  call.place_sums();
  STD_TORCH_CHECK(call.h.columns == rank + probes || call.probe_stride > 0, "h has ", call.h.columns,
                  " columns; rank + probes is ", rank + probes);
  call.B = pack_B(call.group, B, call.x.dtype, false);
  return call;
}

bool covers_all(const Group& group) {
  std::vector<char> covered(static_cast<size_t>(group.rank), 0);
  for (const Slot& slot : group.slots) std::fill_n(covered.begin() + slot.offset, slot.rank, char{1});
  return std::find(covered.begin(), covered.end(), char{0}) == covered.end();
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> wgrad(
    const Tensor& x, const std::vector<Tensor>& dy, const Tensor& h, const std::vector<Tensor>& B,
    const std::vector<int64_t>& offsets, const std::vector<double>& scales, int64_t rank, int64_t probes,
    bool need_dA) {
  const BackwardCall call = read_wgrad(x, dy, h, B, offsets, scales, rank, probes, need_dA);
  const int64_t depth = call.x.columns, block = block_rows(call.widest());
  Tensor dh = new_tensor({call.x.rows, rank}, ScalarType::Float, !covers_all(call.group));
  float* dh_data = static_cast<float*>(dh.mutable_data_ptr());
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(call.x.rows, 2 * (call.first_dA + rank * depth));
  const Scratch<float> sums(call.sums);
  parts.sum(sums.get(), call.sums, [&](int64_t begin, int64_t end, float* of_part) {
    with_type(call.x.dtype, [&](auto type) {
      using T = decltype(type);
      const BackwardScratch<T, float> scratch(call, block);
      for (int64_t m = begin; m < end; m += block) {
        const int64_t rows = std::min(block, end - m);
        run_slots<T, float>(call, m, rows, scratch, dh_data + m * rank, of_part);
        if (need_dA) add_dA<T>(call, m, rows, scratch.as_fp32.get(), dh_data + m * rank, of_part);
      }
    });
  });
  Tensor dA = new_tensor({need_dA ? rank : 0, depth}, ScalarType::Float);
  if (need_dA) write_as_dtype(sums.get() + call.first_dA, rank * depth, dA);
  std::vector<Tensor> dB, Q;
  for (size_t i = 0; i < B.size(); ++i) {
    const Slot& slot = call.group.slots[i];
    const float* gradient = sums.get() + call.gradient[i];
    dB.push_back(new_tensor({slot.columns, slot.rank}, ScalarType::Float));
    Q.push_back(new_tensor({slot.columns, probes}, ScalarType::Float));
    write_transposed(gradient, slot.rank, slot.columns, slot.scale, dB.back());
    write_transposed(gradient + slot.rank * slot.columns, probes, slot.columns, 1.0f, Q.back());
  }
  return {dh, dA, dB, Q};
}

// D and X are the types of d and x, V the one that they are multiplied in.
template <class D, class X, class V>
void outer_rows(const Matrix& d, const Matrix& x, float* out) {
  const int64_t rank = d.columns, columns = x.columns, block = block_rows(columns);
  Parts(x.rows, rank * columns).sum(out, rank * columns, [&](int64_t begin, int64_t end, float* sums) {
    const Scratch<V> d_rows(scratch_for<V, D>(block * rank)), x_rows(scratch_for<V, X>(block * columns));
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      const RowsOf<V> left = rows_as(d.row<D>(m), d.stride, rows, rank, d_rows.get());
      add_outer(left, rank, rows_as(x.row<X>(m), x.stride, rows, columns, x_rows.get()), rows, columns, sums);
    }
  });
}

Tensor outer(const Tensor& d_, const Tensor& x_) {
  const Matrix d = read_matrix(d_, "d"), x = read_matrix(x_, "x");
  check_rows(d.rows, "d", x.rows, "x");
  STD_TORCH_CHECK(d.dtype == x.dtype || d.dtype == ScalarType::Float, "d has dtype ", d.dtype, ", but x has ", x.dtype,
                  "; accepted: the dtype of x, or Float");
  Tensor result = new_tensor({d.columns, x.columns}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  with_types(x.dtype, [&](auto type, auto multiplied) {
    using X = decltype(type);
    if (d.dtype == ScalarType::Float) {
      outer_rows<float, X, float>(d, x, out);
    } else {
      outer_rows<X, X, decltype(multiplied)>(d, x, out);
    }
  });
  return result;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("shrink", TORCH_BOX(&fastlora::shrink));
  m.impl("expand_", TORCH_BOX(&fastlora::expand_));
  m.impl("wgrad", TORCH_BOX(&fastlora::wgrad));
  m.impl("outer", TORCH_BOX(&fastlora::outer));
}

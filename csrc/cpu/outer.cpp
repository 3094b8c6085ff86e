// G = d^T x for a skinny d
#include "cpu/common.h"

namespace fastlora {
namespace {

template <class D, class X>
void run(const Matrix& d, const Matrix& x, float* out) {
  const int64_t rank = d.columns, columns = x.columns, block = block_rows(columns), size = rank * columns;
  const Parts parts(x.rows, rank * columns);
  const Scratch<float> more(parts.count > 1 ? parts.count * size : 0);
  float* sums = parts.count > 1 ? more.get() : out;
  std::fill_n(sums, parts.count * size, 0.0f);
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    const Scratch<float> wide_x(std::is_same_v<X, float> ? 0 : block * columns);
    const Scratch<float> wide_d(std::is_same_v<D, float> ? 0 : block * rank);
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      if constexpr (std::is_same_v<D, bf16>) {
        if (kernels().outer_bf16) {
          kernels().outer_bf16(d.data<D>() + m * d.stride, d.stride, rank, x.data<X>() + m * x.stride, x.stride, rows,
                               columns, sums + part * size, columns);
          continue;
        }
      }
      const float* left = rows_as_float(d.data<D>() + m * d.stride, d.stride, rows, rank, wide_d.get());
      const float* right = rows_as_float(x.data<X>() + m * x.stride, x.stride, rows, columns, wide_x.get());
      kernels().outer(left, float_stride<D>(d.stride, rank), rank, right, float_stride<X>(x.stride, columns), rows,
                      columns, sums + part * size, columns);
    }
  });
  add_parts(sums, size, parts.count);
  if (sums != out) std::copy_n(sums, size, out);
}

Tensor outer(const Tensor& d_, const Tensor& x_) {
  const Matrix d = read_matrix(d_, "d"), x = read_matrix(x_, "x");
  STD_TORCH_CHECK(d.rows == x.rows, "d has ", d.rows, " rows, but x has ", x.rows);
  STD_TORCH_CHECK(d.dtype == x.dtype || d.dtype == ScalarType::Float, "d has dtype ", d.dtype, ", but x has ", x.dtype,
                  "; accepted: the dtype of x, or Float");
  Tensor result = new_tensor({d.columns, x.columns}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  with_type(x.dtype, [&](auto type) {
    using X = decltype(type);
    if (d.dtype == ScalarType::Float) {
      run<float, X>(d, x, out);
    } else {
      run<X, X>(d, x, out);
    }
  });
  return result;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("outer", TORCH_BOX(&fastlora::outer)); }

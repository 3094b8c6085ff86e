// h = x A^T
#include "cpu/common.h"

namespace fastlora {
namespace {

// On products of bf16 pairs.
void run_in_pairs(const Matrix& x, const Matrix& A, bf16* h) {
  const int64_t depth = x.columns, rank = A.rows, block = block_rows(depth);
  const Parts parts(x.rows, depth * rank);
  parts.run([&](int64_t, int64_t begin, int64_t end) {
    const Scratch<float> sums(block * rank);
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      kernels().dot_bf16(x.data<bf16>() + m * x.stride, x.stride, rows, A.data<bf16>(), A.stride, rank, depth,
                         sums.get(), rank);
      kernels().of_bf16.narrow(sums.get(), h + m * rank, rows * rank);
    }
  });
}

template <class T>
void run(const Matrix& x, const float* a, int64_t lda, int64_t rank, T* h) {
  const int64_t depth = x.columns, block = block_rows(depth);
  const Parts parts(x.rows, depth * rank);
  parts.run([&](int64_t, int64_t begin, int64_t end) {
    constexpr bool kNarrow = !std::is_same_v<T, float>;
    const Scratch<float> wide(kNarrow ? block * depth : 0), sums(kNarrow ? block * rank : 0);
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      const float* data = rows_as_float(x.data<T>() + m * x.stride, x.stride, rows, depth, wide.get());
      if constexpr (kNarrow) {
        kernels().dot(data, depth, rows, a, lda, rank, depth, sums.get(), rank);
        kernels().of<T>().narrow(sums.get(), h + m * rank, rows * rank);
      } else {
        kernels().dot(data, x.stride, rows, a, lda, rank, depth, h + m * rank, rank);
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
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, bf16>) {
      if (kernels().dot_bf16) return run_in_pairs(x, A, static_cast<bf16*>(h.mutable_data_ptr()));
    }
    const bool narrow = !std::is_same_v<T, float>;
    const Scratch<float> wide(narrow ? A.rows * A.columns : 0);
    const float* a = rows_as_float(A.data<T>(), A.stride, A.rows, A.columns, wide.get());
    run<T>(x, a, float_stride<T>(A.stride, A.columns), A.rows, static_cast<T*>(h.mutable_data_ptr()));
  });
  return h;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("shrink", TORCH_BOX(&fastlora::shrink)); }

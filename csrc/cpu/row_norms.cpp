// Lengths of the rows of W + s B A, which is never formed: DoRA's.
#include <cmath>

#include "cpu/checks.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastlora {
namespace {

// Rows first.. of a matrix as fp32: the data itself, or a widened copy in the scratch memory.
RowsOf<float> as_fp32(const Matrix& matrix, int64_t first, int64_t rows, float* scratch) {
  RowsOf<float> found{};
  with_type(matrix.dtype, [&](auto type) {
    found = rows_as(matrix.row<decltype(type)>(first), matrix.stride, rows, matrix.columns, scratch);
  });
  return found;
}

int64_t scratch_of(const Matrix& matrix, int64_t rows) {
  return matrix.dtype == ScalarType::Float ? 0 : rows * matrix.columns;
}

Tensor row_norms(const Tensor& W_, const Tensor& A_, const Tensor& B_, double scale) {
  const Matrix W = read_matrix(W_, "W"), A = read_matrix(A_, "A"), B = read_matrix(B_, "B");
  const int64_t depth = W.columns, rank = A.rows, block = block_rows(depth);
  STD_TORCH_CHECK(A.columns == depth, "A has ", A.columns, " columns, but W has ", depth, " (in_features)");
  STD_TORCH_CHECK(B.columns == rank, "B has ", B.columns, " columns, but A has ", rank, " rows (rank)");
  check_rows(B.rows, "B", W.rows, "W");
  Tensor result = new_tensor({W.rows}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  const Scratch<float> A_rows(scratch_of(A, rank)), B_rows(scratch_of(B, B.rows)), gram(rank * rank);
  const RowsOf<float> a = as_fp32(A, 0, rank, A_rows.get()), b = as_fp32(B, 0, B.rows, B_rows.get());
  dot(a, rank, a, rank, depth, gram.get(), rank);
  Parts(W.rows, depth * (rank + 1)).run([&](int64_t, int64_t begin, int64_t end) {
    const Scratch<float> W_rows(scratch_of(W, block)), cross(block * rank);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t rows = std::min(block, end - first);
      const RowsOf<float> w = as_fp32(W, first, rows, W_rows.get());
      dot(w, rows, a, rank, depth, cross.get(), rank);
      for (int64_t n = 0; n < rows; ++n) {
        const float *own = b.data + (first + n) * b.stride, *Aw = cross.get() + n * rank;
        double square = 0.0, absolute = 0.0;
        kernels().norms(w.data + n * w.stride, depth, &square, &absolute);
        for (int64_t i = 0; i < rank; ++i) {
          float along = 0.0f;
          for (int64_t j = 0; j < rank; ++j) along += gram.get()[i * rank + j] * own[j];
          square += scale * own[i] * (2.0 * Aw[i] + scale * along);
        }
        out[first + n] = static_cast<float>(std::sqrt(square < 0.0 ? 0.0 : square));  // NaN stays
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("row_norms", TORCH_BOX(&fastlora::row_norms)); }

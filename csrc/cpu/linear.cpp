// A group's adapted linears in one call a direction, around the library's matmul: linear_lora_forward, _backward.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include "cpu/fused.h"

namespace fastlora {
namespace {

// torch's own kernels without its dispatcher; a torch that has them no more leaves these calls to others.
struct Library {
  using Addmm = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                   AtenTensorHandle mat2, double beta, double alpha);
  using Mm = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle mat1, AtenTensorHandle mat2);
  Addmm addmm = reinterpret_cast<Addmm>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu_addmm_out"));
  Mm mm = reinterpret_cast<Mm>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu_mm_out"));
};

const Library& library() {
  static const Library found;
  return found;
}

// The same memory as a matrix.
Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  // The last number is added to where the tensor starts.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

Tensor transposed(const Tensor& W) { return as_matrix(W, W.size(1), W.size(0), W.stride(1), W.stride(0)); }

// [*, K] as [M, K], copied only where its rows do not lie at equal distances.
Tensor as_rows(const Tensor& tensor) {
  const int64_t dim = tensor.dim(), columns = tensor.size(dim - 1);
  if (dim == 2) return tensor;
  int64_t rows = 1, stride = columns;
  bool even = true;
  for (int64_t i = dim - 2; i >= 0; --i) {
    const int64_t size = tensor.size(i);
    if (size == 1) continue;
    if (rows == 1) stride = tensor.stride(i);
    even = even && tensor.stride(i) == stride * rows;
    rows *= size;
  }
  if (even) return as_matrix(tensor, rows, columns, stride, tensor.stride(dim - 1));
  return as_matrix(torch::stable::contiguous(tensor), rows, columns, columns, 1);
}

// A matrix in the shape [*, columns] of `like` [*, K].
Tensor shaped_like(const Tensor& matrix, const Tensor& like) {
  const int64_t dim = like.dim();
  if (dim == 2) return matrix;
  std::vector<int64_t> sizes, strides(static_cast<size_t>(dim), 1);
  for (int64_t i = 0; i + 1 < dim; ++i) sizes.push_back(like.size(i));
  sizes.push_back(matrix.size(1));
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), dim, sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

bool is_read(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

bool are_read(const std::vector<Tensor>& factors) {
  return std::all_of(factors.begin(), factors.end(), [](const Tensor& f) { return is_read(f.scalar_type()); });
}

bool fits(const Tensor& W, int64_t rows, int64_t columns, ScalarType dtype) {
  return W.dim() == 2 && W.size(0) == rows && W.size(1) == columns && W.scalar_type() == dtype && W.is_cpu();
}

// [2, N] sums of columns with the number of rows behind them in one more column.
Tensor with_count(const Tensor& sums, int64_t rows) {
  const int64_t columns = sums.size(1);
  Tensor out = new_tensor({2, columns + 1}, ScalarType::Double);
  const double* from = static_cast<const double*>(sums.const_data_ptr());
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t row = 0; row < 2; ++row) {
    std::copy_n(from + row * columns, columns, to + row * (columns + 1));
    to[row * (columns + 1) + columns] = static_cast<double>(rows);
  }
  return out;
}

std::vector<Tensor> linear_lora_forward(const Tensor& x, const std::vector<Tensor>& W,
                                        const std::vector<std::optional<Tensor>>& bias, const std::vector<Tensor>& A,
                                        const std::optional<Tensor>& P, const std::vector<Tensor>& B,
                                        const std::vector<int64_t>& outputs, const std::vector<int64_t>& columns,
                                        const std::vector<double>& scales, bool moments,
                                        const std::optional<Tensor>& seed, double p,
                                        const std::vector<int64_t>& streams) {
  const Library& torch = library();
  // The product of other inputs than these is not one of matrices, and has other bits.
  if (torch.addmm == nullptr || torch.mm == nullptr || x.dim() < 2 || (x.dim() > 2 && !x.is_contiguous())) return {};
  const ScalarType dtype = x.scalar_type();
  const int64_t depth = x.size(x.dim() - 1);
  if (!is_read(dtype) || !are_read(A) || !are_read(B) || bias.size() != W.size()) return {};
  for (size_t j = 0; j < W.size(); ++j) {
    if (W[j].dim() != 2 || !fits(W[j], W[j].size(0), depth, dtype)) return {};
    if (bias[j] && (bias[j]->dim() != 1 || bias[j]->size(0) != W[j].size(0) || bias[j]->scalar_type() != dtype)) {
      return {};
    }
  }
  const Tensor rows = as_rows(x);
  std::vector<Tensor> y;
  for (size_t j = 0; j < W.size(); ++j) {
    y.push_back(new_tensor({rows.size(0), W[j].size(0)}, dtype));
    const Tensor right = transposed(W[j]);
    TORCH_ERROR_CODE_CHECK(bias[j] ? torch.addmm(y[j].get(), bias[j]->get(), rows.get(), right.get(), 1.0, 1.0)
                                   : torch.mm(y[j].get(), rows.get(), right.get()));
  }
  auto [h, sums] = lora_forward_(y, rows, A, P, B, outputs, columns, scales, moments, seed, p, streams);
  std::vector<Tensor> out;
  for (const Tensor& of_rows : y) out.push_back(shaped_like(of_rows, x));
  out.push_back(h);
  for (const Tensor& of_y : sums) out.push_back(with_count(of_y, rows.size(0)));
  return out;
}

std::vector<Tensor> linear_lora_backward(const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                                         const std::vector<Tensor>& W, const std::vector<Tensor>& A,
                                         const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                                         const std::vector<int64_t>& columns, const std::vector<double>& scales,
                                         int64_t probes, bool need_dx, bool need_dA, bool need_dB,
                                         const std::optional<Tensor>& seed, double p,
                                         const std::vector<int64_t>& streams) {
  const Library& torch = library();
  if (torch.addmm == nullptr || torch.mm == nullptr || x.dim() < 2 || dy.empty() || dy.size() != W.size()) return {};
  const ScalarType dtype = x.scalar_type();
  if (!is_read(dtype) || !are_read(A) || !are_read(B)) return {};
  const Tensor rows = as_rows(x);
  std::vector<Tensor> grads;
  for (size_t j = 0; j < dy.size(); ++j) {
    if (dy[j].dim() < 2 || dy[j].scalar_type() != dtype) return {};
    grads.push_back(as_rows(dy[j]));
    if (grads[j].size(0) != rows.size(0) || !fits(W[j], grads[j].size(1), rows.size(1), dtype)) return {};
  }
  std::optional<Tensor> dx;
  if (need_dx) {
    dx = new_tensor({rows.size(0), rows.size(1)}, dtype);
    TORCH_ERROR_CODE_CHECK(torch.mm(dx->get(), grads[0].get(), W[0].get()));
    for (size_t j = 1; j < grads.size(); ++j) {
      TORCH_ERROR_CODE_CHECK(torch.addmm(dx->get(), dx->get(), grads[j].get(), W[j].get(), 1.0, 1.0));
    }
  }
  auto [dA, dB, Q] =
      lora_backward_(dx, grads, rows, h, A, B, outputs, columns, scales, probes, need_dA, need_dB, seed, p, streams);
  std::vector<Tensor> out;
  if (dx) out.push_back(shaped_like(*dx, x));
  for (const std::vector<Tensor>* part : {&dA, &dB, &Q}) out.insert(out.end(), part->begin(), part->end());
  return out;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("linear_lora_forward", TORCH_BOX(&fastlora::linear_lora_forward));
  m.impl("linear_lora_backward", TORCH_BOX(&fastlora::linear_lora_backward));
}

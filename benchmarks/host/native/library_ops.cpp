// fastlora's own operators that have CUDA kernels: their outputs and kernels, for as many matrices as one table holds.
// Others take the fallback.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "null_gpu.h"

namespace {

using at::Tensor;
using at::TensorList;

void kernel(const char* name) { null_gpu_note(kKernel, name, nullptr, 0); }

std::tuple<Tensor, Tensor> build_segments(const Tensor& ids, int64_t adapters) {
  kernel("build_segments");
  return {at::empty({ids.size(0)}, ids.options()), at::empty({adapters, 2}, ids.options())};
}

Tensor segment_tiles(const Tensor& ranges, int64_t rows, int64_t block) {
  kernel("segment_tiles");
  return at::empty({(rows + block - 1) / block + ranges.size(0), 2}, ranges.options());
}

Tensor penalty(TensorList, TensorList, at::ArrayRef<double>, const Tensor& weights) {
  for (const char* name : {"grams", "sum_grams", "penalty", "total"}) kernel(name);
  return at::empty({}, weights.options().dtype(at::kFloat));
}

void penalty_grad_(TensorList, TensorList, TensorList, TensorList, at::ArrayRef<double>, const Tensor&, double) {
  for (const char* name : {"grams", "sum_grams", "penalty_grad"}) kernel(name);
}

Tensor squared_norms(TensorList tensors) {
  kernel("norms");
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() <= 8192) continue;  // of more than one chunk
    kernel("sum_norms");
    break;
  }
  return at::empty({static_cast<int64_t>(tensors.size())}, tensors[0].options().dtype(at::kDouble));
}

Tensor output_variances(TensorList moments, at::IntArrayRef, at::IntArrayRef sizes) {
  kernel("variances");
  return at::empty({static_cast<int64_t>(sizes.size())}, moments[0].options());
}

void resize_ranks_(TensorList, TensorList) { kernel("resize_ranks_"); }

void philox_signs_(Tensor&, const Tensor&, int64_t, int64_t, int64_t, at::IntArrayRef) { kernel("philox_signs_"); }

TORCH_LIBRARY_IMPL(fastlora, PrivateUse1, m) {
  m.impl("build_segments", &build_segments);
  m.impl("segment_tiles", &segment_tiles);
  m.impl("penalty", &penalty);
  m.impl("penalty_grad_", &penalty_grad_);
  m.impl("squared_norms", &squared_norms);
  m.impl("output_variances", &output_variances);
  m.impl("resize_ranks_", &resize_ranks_);
  m.impl("philox_signs_", &philox_signs_);
}

}  // namespace

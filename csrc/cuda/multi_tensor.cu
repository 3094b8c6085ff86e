// A fixed number of launches for the small matrices of all layers: the penalty and its gradient, squared norms,
// variances, copies, probe signs.
#include "cuda/multi_tensor.cuh"

#include "cuda/common.cuh"
#include "cuda/penalty.cuh"

namespace fastlora::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

Number number_of(const Tensor& tensor, const char* name, bool allows_double = false) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Number::kFloat;
  if (dtype == ScalarType::Half) return Number::kHalf;
  if (dtype == ScalarType::BFloat16) return Number::kBFloat16;
  STD_TORCH_CHECK(allows_double && dtype == ScalarType::Double, name, " has dtype ", dtype,
                  "; the CUDA operators take Float, BFloat16 and Half", allows_double ? ", and here Double" : "");
  return Number::kDouble;
}

void check_device(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " is not on device cuda:", device);
}

void check_matrix(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions; a matrix with 2 is needed");
  check_device(tensor, device, name);
}

bool has_unit_columns(const Tensor& tensor) { return tensor.size(1) <= 1 || tensor.stride(1) == 1; }

// The tensor, or a copy with unit columns that `kept` holds until the launch.
Tensor readable(const Tensor& tensor, TensorList& kept) {
  if (has_unit_columns(tensor)) return tensor;
  kept.push_back(torch::stable::contiguous(tensor));
  return kept.back();
}

void check_target(const Tensor& to, int64_t rows, int64_t columns, int32_t device, const char* name, size_t i) {
  check_matrix(to, device, name);
  STD_TORCH_CHECK(to.size(0) == rows && to.size(1) == columns, name, "[", i, "] is ", to.size(0), " x ", to.size(1),
                  ", but its factor is ", rows, " x ", columns);
  STD_TORCH_CHECK(has_unit_columns(to), name, "[", i, "] has column stride ", to.stride(1), "; 1 is needed");
}

struct Entries {
  std::vector<PenaltyEntry> list;
  TensorList kept;
  int64_t grams = 0;
};

Number check_weights(const Tensor& weights, size_t count) {
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(weights.dim() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), "weights has ",
                  weights.dim(), " dimensions and dtype ", dtype, "; a Float or Double vector is needed");
  STD_TORCH_CHECK(weights.numel() == static_cast<int64_t>(count), "weights has ", weights.numel(),
                  " entries, but A has ", count);
  return number_of(weights, "weights", true);
}

Entries read_entries(const TensorList& A, const TensorList& B, const std::vector<double>& scales, int32_t device) {
  STD_TORCH_CHECK(B.size() == A.size(), "B has ", B.size(), " entries, but A has ", A.size());
  STD_TORCH_CHECK(scales.size() == A.size(), "scales has ", scales.size(), " entries, but A has ", A.size());
  Entries out;
  out.list.reserve(A.size());
  for (size_t i = 0; i < A.size(); ++i) {
    check_matrix(A[i], device, "A");
    check_matrix(B[i], device, "B");
    const int64_t rank = A[i].size(0);
    STD_TORCH_CHECK(B[i].size(1) == rank, "B[", i, "] has ", B[i].size(1), " columns, but A[", i, "] has ", rank,
                    " rows (rank)");
    const Tensor a = readable(A[i], out.kept), b = readable(B[i], out.kept);
    PenaltyEntry entry{};
    entry.A = a.const_data_ptr();
    entry.B = b.const_data_ptr();
    entry.lda = a.stride(0);
    entry.ldb = b.stride(0);
    entry.depth = a.size(1);
    entry.width = b.size(0);
    entry.rank = rank;
    entry.grams = out.grams;
    entry.scale = scales[i];
    entry.type_A = number_of(a, "A");
    entry.type_B = number_of(b, "B");
    out.grams += gram_floats(entry);
    out.list.push_back(entry);
  }
  return out;
}

Tensor penalty(const TensorList& A, const TensorList& B, const std::vector<double>& scales, const Tensor& weights_) {
  const int32_t device = weights_.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Number weight_type = check_weights(weights_, A.size());
  const Entries entries = read_entries(A, B, scales, device);
  const Tensor weights = torch::stable::contiguous(weights_);
  const int64_t count = static_cast<int64_t>(A.size());
  Tensor values = torch::stable::new_empty(weights, {count}, ScalarType::Double);
  Tensor grams = torch::stable::new_empty(weights, {entries.grams}, ScalarType::Float);
  Tensor total = torch::stable::new_empty(weights, {}, ScalarType::Float);
  check_launch(
      write_penalty(entries.list, weights.const_data_ptr(), weight_type, static_cast<float*>(grams.mutable_data_ptr()),
                    static_cast<double*>(values.mutable_data_ptr()), static_cast<float*>(total.mutable_data_ptr()),
                    current_stream(device)),
      "penalty");
  return total;
}

void penalty_grad_(TensorList dA, TensorList dB, const TensorList& A, const TensorList& B,
                   const std::vector<double>& scales, const Tensor& weights_, double weight) {
  const int32_t device = weights_.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Number weight_type = check_weights(weights_, A.size());
  Entries entries = read_entries(A, B, scales, device);
  STD_TORCH_CHECK(dA.size() == A.size(), "dA has ", dA.size(), " entries, but A has ", A.size());
  STD_TORCH_CHECK(dB.size() == A.size(), "dB has ", dB.size(), " entries, but B has ", B.size());
  for (size_t i = 0; i < A.size(); ++i) {
    PenaltyEntry& entry = entries.list[i];
    if (dA[i].numel() > 0) {
      check_target(dA[i], entry.rank, entry.depth, device, "dA", i);
      entry.dA = dA[i].mutable_data_ptr();
      entry.ldda = dA[i].stride(0);
      entry.type_dA = number_of(dA[i], "dA");
    }
    if (dB[i].numel() > 0) {
      check_target(dB[i], entry.width, entry.rank, device, "dB", i);
      entry.dB = dB[i].mutable_data_ptr();
      entry.lddb = dB[i].stride(0);
      entry.type_dB = number_of(dB[i], "dB");
    }
  }
  const Tensor weights = torch::stable::contiguous(weights_);
  Tensor grams = torch::stable::new_empty(weights, {entries.grams}, ScalarType::Float);
  check_launch(add_penalty_grad(entries.list, weights.const_data_ptr(), weight_type, weight,
                                static_cast<float*>(grams.mutable_data_ptr()), current_stream(device)),
               "penalty_grad_");
}

Tensor squared_norms(const TensorList& tensors) {
  const int32_t device = tensors[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<NormEntry> entries;
  TensorList kept;
  int64_t blocks = 0;
  for (const Tensor& tensor : tensors) {
    check_device(tensor, device, "tensors");
    kept.push_back(torch::stable::contiguous(tensor));
    entries.push_back({kept.back().const_data_ptr(), tensor.numel(), number_of(tensor, "tensors", true), 0});
    blocks += norm_blocks(tensor.numel());
  }
  Tensor out = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(tensors.size())}, ScalarType::Double);
  Tensor partial = torch::stable::new_empty(tensors[0], {blocks}, ScalarType::Double);
  check_launch(write_norms(entries, static_cast<double*>(partial.mutable_data_ptr()),
                           static_cast<double*>(out.mutable_data_ptr()), current_stream(device)),
               "squared_norms");
  return out;
}

Tensor output_variances(const TensorList& moments, const std::vector<int64_t>& runs,
                        const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(runs.size() == moments.size(), "runs has ", runs.size(), " entries, but moments has ",
                  moments.size());
  const int32_t device = moments[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<VarianceEntry> entries;
  TensorList kept;
  for (size_t i = 0; i < moments.size(); ++i) {
    const Tensor& m = moments[i];
    check_matrix(m, device, "moments");
    STD_TORCH_CHECK(m.scalar_type() == ScalarType::Double, "moments has dtype ", m.scalar_type(),
                    "; the sums of every layer are Double");
    STD_TORCH_CHECK(runs[i] >= 0 && entries.size() + static_cast<size_t>(runs[i]) <= sizes.size(),
                    "runs: more than the ", sizes.size(), " sizes were asked for");
    kept.push_back(torch::stable::contiguous(m));
    const double* sums = static_cast<const double*>(kept.back().const_data_ptr());
    int64_t first = 0;
    for (int64_t run = 0; run < runs[i]; ++run) {
      const int64_t count = sizes[entries.size()];
      STD_TORCH_CHECK(count >= 0, "sizes has ", count, "; accepted: 0 or more");
      entries.push_back({sums, m.size(1) - 1, first, count});
      first += count;
    }
    STD_TORCH_CHECK(m.size(0) == 2 && m.size(1) == first + 1, "moments[", i, "] is ", m.size(0), " x ", m.size(1),
                    "; its sizes make 2 x ", first + 1);
  }
  STD_TORCH_CHECK(entries.size() == sizes.size(), "sizes has ", sizes.size(), " entries, but runs ask for ",
                  entries.size());
  Tensor out = torch::stable::new_empty(moments[0], {static_cast<int64_t>(sizes.size())}, ScalarType::Double);
  check_launch(write_variances(entries, static_cast<double*>(out.mutable_data_ptr()), current_stream(device)),
               "output_variances");
  return out;
}

void resize_ranks_(TensorList to, const TensorList& source) {
  STD_TORCH_CHECK(source.size() == to.size(), "source has ", source.size(), " entries, but to has ", to.size());
  const int32_t device = to[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<CopyEntry> entries;
  TensorList kept;
  for (size_t i = 0; i < to.size(); ++i) {
    check_matrix(to[i], device, "to");
    check_matrix(source[i], device, "source");
    const Number type = number_of(to[i], "to", true);
    STD_TORCH_CHECK(source[i].scalar_type() == to[i].scalar_type(), "source has dtype ", source[i].scalar_type(),
                    ", but to has ", to[i].scalar_type(), "; they must be the same");
    const int64_t rows = to[i].size(0), columns = to[i].size(1);
    STD_TORCH_CHECK(rows == source[i].size(0) || columns == source[i].size(1), "to[", i, "] is ", rows, " x ", columns,
                    ", but source[", i, "] is ", source[i].size(0), " x ", source[i].size(1),
                    "; only the rank may differ");
    STD_TORCH_CHECK(has_unit_columns(to[i]), "to[", i, "] has column stride ", to[i].stride(1), "; 1 is needed");
    const Tensor from = readable(source[i], kept);
    const int32_t item = type == Number::kDouble ? 8 : type == Number::kFloat ? 4 : 2;
    entries.push_back({to[i].mutable_data_ptr(), from.const_data_ptr(), to[i].stride(0), from.stride(0), rows, columns,
                       std::min(rows, from.size(0)), std::min(columns, from.size(1)), item});
  }
  check_launch(copy_all(entries, current_stream(device)), "resize_ranks_");
}

bool fits_word(int64_t value) { return value >= 0 && value <= 0xffffffffll; }

void philox_signs_(Tensor out, const Tensor& seed, int64_t step, int64_t first, int64_t tag,
                   const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(out.dim() == 1 && out.scalar_type() == ScalarType::Float && out.is_contiguous(), "out has dtype ",
                  out.scalar_type(), " and ", out.dim(), " dimensions; a contiguous Float vector is needed");
  const int32_t device = out.get_device_index();
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long, "seed has ", seed.dim(),
                  " dimensions and dtype ", seed.scalar_type(), "; a Long tensor with 0 dimensions is needed");
  check_device(seed, device, "seed");
  STD_TORCH_CHECK(
      fits_word(step) && fits_word(tag) && fits_word(first) && fits_word(first + static_cast<int64_t>(counts.size())),
      "step is ", step, ", first ", first, ", tag ", tag, "; accepted: 0 to 2^32 - 1");
  int64_t total = 0;
  for (const int64_t count : counts) {
    STD_TORCH_CHECK(count >= 0, "counts has ", count, "; accepted: 0 or more");
    total += count;
  }
  STD_TORCH_CHECK(out.numel() == total * kSignsPerCounter, "out has ", out.numel(), " elements; counts need ",
                  total * kSignsPerCounter);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const SignCounter counter{static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<uint32_t>(step),
                            static_cast<uint32_t>(first), static_cast<uint32_t>(tag)};
  check_launch(write_signs(counts, counter, static_cast<float*>(out.mutable_data_ptr()), current_stream(device)),
               "philox_signs_");
}

}  // namespace
}  // namespace fastlora::cuda

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("penalty", TORCH_BOX(&fastlora::cuda::penalty));
  m.impl("penalty_grad_", TORCH_BOX(&fastlora::cuda::penalty_grad_));
  m.impl("squared_norms", TORCH_BOX(&fastlora::cuda::squared_norms));
  m.impl("output_variances", TORCH_BOX(&fastlora::cuda::output_variances));
  m.impl("resize_ranks_", TORCH_BOX(&fastlora::cuda::resize_ranks_));
  m.impl("philox_signs_", TORCH_BOX(&fastlora::cuda::philox_signs_));
}

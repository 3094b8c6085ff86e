// A group of projections that share x, as the two fused passes see it.
#pragma once
#include "cpu/common.h"
#include "cpu/pack.h"

namespace fastlora {

// One projection: ranks offset.. of h, columns column.. of matrix `output` (-1: it has none).
struct Slot {
  int64_t rank, columns, offset, output, column;
  int64_t packed;  // where scale * B^T, [rank, columns], lies among the packed factors
  float scale;
};

struct Group {
  std::vector<Slot> slots;
  int64_t rank = 0, packed = 0;  // of all projections together
};

inline void check_operand(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  check_dtype(tensor.scalar_type(), name);
}

// Reads where every projection lies; outputs[i] is -1, or one of the `matrices` whose widths are given.
inline Group read_group(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                        const std::vector<int64_t>& columns, const std::vector<double>& scales, int64_t depth,
                        const std::vector<int64_t>& widths) {
  STD_TORCH_CHECK(B.size() == A.size(), "B has ", B.size(), " entries, but A has ", A.size());
  STD_TORCH_CHECK(outputs.size() == A.size(), "outputs has ", outputs.size(), " entries, but A has ", A.size());
  STD_TORCH_CHECK(columns.size() == A.size(), "columns has ", columns.size(), " entries, but A has ", A.size());
  STD_TORCH_CHECK(scales.size() == A.size(), "scales has ", scales.size(), " entries, but A has ", A.size());
  const int64_t matrices = static_cast<int64_t>(widths.size());
  Group group;
  group.slots.reserve(A.size());
  for (size_t i = 0; i < A.size(); ++i) {
    check_operand(A[i], "A");
    check_operand(B[i], "B");
    const Slot it{
        B[i].size(1), B[i].size(0), group.rank, outputs[i], columns[i], group.packed, static_cast<float>(scales[i])};
    STD_TORCH_CHECK(A[i].size(1) == depth, "A has ", A[i].size(1), " columns, but x has ", depth, " (in_features)");
    STD_TORCH_CHECK(A[i].size(0) == it.rank, "A has ", A[i].size(0), " rows, but B has ", it.rank, " columns (rank)");
    STD_TORCH_CHECK(it.output >= -1 && it.output < matrices, "outputs: ", it.output, " was asked for, of ", matrices);
    STD_TORCH_CHECK(it.output < 0 || (it.column >= 0 && it.column + it.columns <= widths[it.output]),
                    "columns: ", it.column, " to ", it.column + it.columns, " were asked for, but there are ",
                    it.output < 0 ? 0 : widths[it.output]);
    group.rank += it.rank;
    group.packed += it.rank * it.columns;
    group.slots.push_back(it);
  }
  return group;
}

// scale_i B_i^T of every projection that has an output, or B_i^T alone.
inline Scratch<float> pack_B(const Group& group, const std::vector<Tensor>& B, ScalarType rounded, bool scaled = true) {
  Scratch<float> out(group.packed);
  for (size_t i = 0; i < B.size(); ++i) {
    const Slot& it = group.slots[i];
    if (it.output >= 0) {
      pack(B[i], scaled ? it.scale : 1.0f, rounded, out.get() + it.packed, true);
    } else {
      std::fill_n(out.get() + it.packed, it.rank * it.columns, 0.0f);
    }
  }
  return out;
}

// [A_0; A_1; ...; P], with extra rows for P.
inline Scratch<float> pack_A(const Group& group, const std::vector<Tensor>& A, const std::optional<Tensor>& P,
                             int64_t depth, ScalarType rounded) {
  Scratch<float> out((group.rank + (P ? P->size(0) : 0)) * depth);
  for (size_t i = 0; i < A.size(); ++i) pack(A[i], 1.0f, rounded, out.get() + group.slots[i].offset * depth);
  if (P) pack(*P, 1.0f, rounded, out.get() + group.rank * depth);
  return out;
}

// A matrix that is written in place.
struct Target {
  void* data;
  int64_t rows, columns, stride;

  template <class T>
  T* row(int64_t m) const {
    return static_cast<T*>(data) + m * stride;
  }
};

inline Target write_target(Tensor& tensor, const char* name, int64_t rows, ScalarType dtype) {
  check_matrix(tensor, name);
  check_same_dtype(tensor.scalar_type(), name, dtype, "x");
  STD_TORCH_CHECK(tensor.size(0) == rows, name, " has ", tensor.size(0), " rows, but x has ", rows);
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, " has column stride ", tensor.stride(1),
                  "; 1 is needed");
  return {tensor.mutable_data_ptr(), rows, tensor.size(1), tensor.stride(0)};
}

}  // namespace fastlora

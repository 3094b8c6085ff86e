// What the CPU operators accept: each check names the argument, what is needed and what was given.
#pragma once
#include <torch/csrc/stable/library.h>

#include "cpu/memory.h"

namespace fastlora {

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions; a matrix with 2 is needed");
}

inline void check_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " has dtype ", dtype, "; the CPU operators take Float, BFloat16 and Half");
}

inline void check_same_dtype(ScalarType dtype, const char* name, ScalarType expected, const char* other) {
  STD_TORCH_CHECK(dtype == expected, name, " has dtype ", dtype, ", but ", other, " has ", expected,
                  "; they must be the same");
}

inline void check_unit_columns(const Tensor& matrix, const char* name) {
  STD_TORCH_CHECK(matrix.size(1) <= 1 || matrix.stride(1) == 1, name, " has column stride ", matrix.stride(1),
                  "; 1 is needed");
}

// One of two lists that go entry by entry.
inline void check_entries(size_t entries, const char* name, size_t expected, const char* other) {
  STD_TORCH_CHECK(entries == expected, name, " has ", entries, " entries, but ", other, " has ", expected);
}

inline void check_rows(int64_t rows, const char* name, int64_t expected, const char* other) {
  STD_TORCH_CHECK(rows == expected, name, " has ", rows, " rows, but ", other, " has ", expected);
}

inline void check_not_negative(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0, name, " is ", value, "; accepted: 0 or more");
}

// The seed of a counter-based generator.
inline uint64_t read_seed(const Tensor& seed) {
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long, "seed has ", seed.dim(),
                  " dimensions and dtype ", seed.scalar_type(), "; a Long tensor with 0 dimensions is needed");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

// A matrix whose last stride is 1; owns the copy if one was needed.
struct Matrix {
  Tensor tensor;
  int64_t rows = 0, columns = 0, stride = 0;
  ScalarType dtype = ScalarType::Float;

  template <class T>
  const T* row(int64_t m) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + m * stride;
  }
};

inline Matrix read_matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  const ScalarType dtype = tensor.scalar_type();
  check_dtype(dtype, name);
  const bool direct = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  Matrix matrix{direct ? tensor : torch::stable::contiguous(tensor), tensor.size(0), tensor.size(1), 0, dtype};
  matrix.stride = matrix.tensor.stride(0);
  return matrix;
}

}  // namespace fastlora

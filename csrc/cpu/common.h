// What the CPU operators share: argument checks, outputs, scratch memory and the static split of rows over threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised memory, aligned to a cache line; no memory for no elements.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0
                  ? nullptr
                  : static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// A matrix whose last stride is 1; owns the copy if one was needed.
struct Matrix {
  Tensor tensor;
  int64_t rows = 0, columns = 0, stride = 0;
  ScalarType dtype = ScalarType::Float;

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has ", tensor.dim(), " dimensions; a matrix with 2 is needed");
}

inline void check_dtype(ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " has dtype ", dtype, "; the CPU operators take Float, BFloat16 and Half");
}

// Calls f with a value of the C++ type of a checked dtype; only its type is of interest.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f(float{});
  } else if (dtype == ScalarType::BFloat16) {
    f(bf16{});
  } else {
    f(fp16{});
  }
}

inline void check_same_dtype(ScalarType dtype, const char* name, ScalarType expected, const char* other) {
  STD_TORCH_CHECK(dtype == expected, name, " has dtype ", dtype, ", but ", other, " has ", expected,
                  "; they must be the same");
}

inline Matrix read_matrix(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  const ScalarType dtype = tensor.scalar_type();
  check_dtype(dtype, name);
  const bool direct = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  Matrix matrix{direct ? tensor : torch::stable::contiguous(tensor), tensor.size(0), tensor.size(1), 0, dtype};
  matrix.stride = matrix.tensor.stride(0);
  return matrix;
}

// A new contiguous CPU tensor; cheaper than going through the dispatcher.
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, bool zero = false) {
  int64_t strides[4] = {}, numel = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = std::max<int64_t>(numel, 1);
    numel *= sizes.begin()[i];
  }
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const int64_t width = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  if (zero && numel > 0) std::fill_n(static_cast<char*>(tensor.mutable_data_ptr()), numel * width, char{0});
  return tensor;
}

// fp32 view of rows of a matrix: the data itself, or a widened copy in the scratch memory.
inline const float* rows_as_float(const float* from, int64_t, int64_t, int64_t, float*) { return from; }
template <class T>
const float* rows_as_float(const T* from, int64_t stride, int64_t rows, int64_t columns, float* scratch) {
  if (stride == columns) {
    kernels().of<T>().widen(from, scratch, rows * columns);
  } else {
    for (int64_t m = 0; m < rows; ++m) kernels().of<T>().widen(from + m * stride, scratch + m * columns, columns);
  }
  return scratch;
}
template <class T>
int64_t float_stride(int64_t stride, int64_t columns) {
  return std::is_same_v<T, float> ? stride : columns;
}

// Static split of rows into parts. It depends only on the shape and the thread count, so that results repeat bit by
// bit.
struct Parts {
  int64_t rows, count;

  Parts(int64_t rows_, int64_t work_per_row) : rows(rows_), count(1) {
    constexpr int64_t kWorkPerThread = worth_a_thread(1 << 19);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t useful = rows * std::max<int64_t>(work_per_row, 1) / kWorkPerThread;
    count = std::max<int64_t>(1, std::min({threads, useful, rows / 8}));
  }
  int64_t begin(int64_t part) const { return rows * part / count; }

  // Calls f(part, first row, last row) for every part.
  template <class F>
  void run(const F& f) const {
    parallel_for(count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) f(part, begin(part), begin(part + 1));
    });
  }
};

// Rows per block: a block of the widest matrix stays in the second-level cache. At least 48, over which the sums of a
// wide matrix are loaded and stored once; at most 192, because every row of a matrix lies on pages of its own.
inline int64_t block_rows(int64_t columns) {
  const int64_t rows = (int64_t{32} << 10) / std::max<int64_t>(columns, 1);
  return std::clamp<int64_t>(rows / 12 * 12, 48, 192);
}

// sums[0..count) += the partial sums of parts 1.., in their order.
inline void add_parts(float* sums, int64_t count, int64_t parts) {
  for (int64_t part = 1; part < parts; ++part) {
    const float* other = sums + part * count;
    for (int64_t i = 0; i < count; ++i) sums[i] += other[i];
  }
}

}  // namespace fastlora

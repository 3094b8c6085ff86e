// Memory of the CPU operators: new tensors, scratch memory, and the C++ types of their elements.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/floats.h"

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
  const int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  if (zero && numel > 0) std::fill_n(static_cast<char*>(tensor.mutable_data_ptr()), numel * bytes, char{0});
  return tensor;
}

}  // namespace fastlora

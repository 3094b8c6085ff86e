// What the CUDA operators share on the host.
#pragma once
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/numbers.cuh"

namespace fastlora::cuda {

// Looked up at run time: linking CUDA torch would keep the library from loading beside a CPU-only torch.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "this torch has no CUDA, so the CUDA operators cannot run");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "the current CUDA stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, " failed to start: ", cudaGetErrorString(error));
}

}  // namespace fastlora::cuda

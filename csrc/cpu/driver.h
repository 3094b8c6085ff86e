// The CUDA driver, found at run time: linking it would keep the library from loading where there is no GPU.
#pragma once
#include <cstdint>
#include <string>

#include "plan.h"

namespace fastlora::plan {

// CUlaunchConfig
struct LaunchConfig {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  const Attribute* attributes;
  uint32_t attribute_count;
};

// The functions of one libcuda that a run needs, or the reason why there are none.
class Driver {
 public:
  explicit Driver(const std::string& library);

  const std::string& reason() const { return reason_; }

  // Makes a context of the device current in this thread if it has none, as a thread that never used CUDA.
  void enter(int32_t device) const;

  // params: where the bytes of each argument are.
  void start(const Launch& launch, void* stream, void** params) const;

 private:
  using Result = int;

  void check(Result result, const std::string& what) const;

  std::string reason_;
  Result (*launch_)(const LaunchConfig*, void*, void**, void**) = nullptr;
  Result (*current_)(void**) = nullptr;
  Result (*set_current_)(void*) = nullptr;
  Result (*device_)(int*, int) = nullptr;
  Result (*retain_)(void**, int) = nullptr;
  Result (*error_string_)(Result, const char**) = nullptr;
};

}  // namespace fastlora::plan

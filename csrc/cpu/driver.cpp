// Functions of libcuda by name, and what their results say.
#include "cpu/driver.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace fastlora::plan {

Driver::Driver(const std::string& library) {
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    reason_ = library + " cannot be loaded: " + (why ? why : "no reason given");
    return;
  }
  const auto find = [&](auto& function, const char* name) {
    void* const symbol = dlsym(handle, name);
    if (symbol == nullptr && reason_.empty()) reason_ = library + " has no " + name + ": the driver is too old";
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find(launch_, "cuLaunchKernelEx");
  find(current_, "cuCtxGetCurrent");
  find(set_current_, "cuCtxSetCurrent");
  find(device_, "cuDeviceGet");
  find(retain_, "cuDevicePrimaryCtxRetain");
  find(error_string_, "cuGetErrorString");
}

void Driver::check(Result result, const std::string& what) const {
  if (result == 0) return;
  const char* name = nullptr;
  error_string_(result, &name);
  STD_TORCH_CHECK(false, "native launch: ", what, " failed: ", name ? name : "error", " (", result, ")");
}

void Driver::enter(int32_t device) const {
  void* context = nullptr;
  check(current_(&context), "cuCtxGetCurrent");
  if (context != nullptr) return;
  int handle = 0;
  check(device_(&handle, device), "cuDeviceGet");
  check(retain_(&context, handle), "cuDevicePrimaryCtxRetain");
  check(set_current_(context), "cuCtxSetCurrent");
}

void Driver::start(const Launch& launch, void* stream, void** params) const {
  LaunchConfig config{{launch.grid[0], launch.grid[1], launch.grid[2]},
                      {launch.block[0], launch.block[1], launch.block[2]},
                      launch.shared_bytes,
                      stream,
                      launch.attributes.data(),
                      static_cast<uint32_t>(launch.attributes.size())};
  const Result result = launch_(&config, reinterpret_cast<void*>(launch.function), params, nullptr);
  if (result != 0) check(result, launch.name);
}

}  // namespace fastlora::plan

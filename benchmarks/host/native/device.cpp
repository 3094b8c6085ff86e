// The torch device "null": streams, devices and memory that exist as numbers only.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <atomic>

#include "null_gpu.h"

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kMostDevices = 16;
std::atomic<int> device_count{1};
std::atomic<int64_t> next_stream{1};
thread_local c10::DeviceIndex current_device = 0;
thread_local int64_t current_stream[kMostDevices] = {};

// As cudaSetDevice does, the device's context becomes the thread's current one, and gives the device before.
c10::DeviceIndex make_current(c10::DeviceIndex device) {
  using Enter = void (*)(int);
  static const auto enter = reinterpret_cast<Enter>(dlsym(RTLD_DEFAULT, "null_gpu_enter"));
  if (enter != nullptr && device != current_device) enter(device);
  return std::exchange(current_device, device);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return c10::Device(kType, make_current(device.index()));
  }
  c10::Device getDevice() const override { return c10::Device(kType, current_device); }
  void setDevice(c10::Device device) const override { make_current(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { make_current(device.index()); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_stream[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count.load()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { null_gpu_note(kSynchronize, "stream", nullptr, 0); }
  void synchronizeDevice(const c10::DeviceIndex) const override { null_gpu_note(kSynchronize, "device", nullptr, 0); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void release(void* data) { null_gpu_free(reinterpret_cast<uint64_t>(data)); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, current_device);
    if (bytes == 0) return {nullptr, nullptr, nullptr, device};
    void* data = reinterpret_cast<void*>(null_gpu_allocate(bytes));
    return {data, data, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, std::size_t) const override { null_gpu_note(kKernel, "copy", nullptr, 0); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count.load()); }
  void setCurrentDevice(c10::DeviceIndex device) const override { make_current(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return make_current(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current_device : make_current(device);
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

}  // namespace

extern "C" {
void null_gpu_set_device_count(int count) { device_count = count; }
int null_gpu_current_device() { return current_device; }
int64_t null_gpu_current_stream(int device) { return current_stream[device]; }
void null_gpu_set_stream(int device, int64_t stream) { current_stream[device] = stream; }
void null_gpu_set_current_device(int device) { make_current(static_cast<c10::DeviceIndex>(device)); }
int null_gpu_exchange_device(int device) { return hooks.maybeExchangeDevice(static_cast<c10::DeviceIndex>(device)); }
}

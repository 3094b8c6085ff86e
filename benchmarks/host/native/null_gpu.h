// What the null driver keeps of what it is asked for; the torch device of this folder reports to the same log.
#pragma once
#include <cstdint>
#include <string_view>

enum NullGpuEvent : uint32_t {
  kLaunch,       // cuLaunchKernel[Ex]
  kTensorMap,    // cuTensorMapEncode*
  kMemory,       // cuMemcpy*, cuMemset* of the driver
  kAttribute,    // cuFuncSetAttribute, cuFuncSetCacheConfig
  kSynchronize,  // cu*Synchronize, and torch's
  kAllocate,     // device memory, by torch or by the driver
  kFree,
  kKernel,    // a kernel of torch's own
  kGemm,      // a call of the matmul library
  kToDevice,  // a copy from the host
  kToHost,    // a copy or a number read back by the host
  kFallback,  // an operator of torch that this device has no kernel for: shapes only, and slow
  kEvents,
};

struct NullGpuField {
  const void* data;
  uint32_t size;
  NullGpuField(const void* data, size_t size) : data(data), size(static_cast<uint32_t>(size)) {}
  explicit NullGpuField(std::string_view text) : NullGpuField(text.data(), text.size()) {}
  // The field keeps the address: the value must outlive the call.
  template <class T>
  static NullGpuField of(const T& value) {
    return {&value, sizeof(T)};
  }
};

extern "C" {
// Counts the event and, while a record is kept, writes it down. Any thread.
void null_gpu_note(uint32_t event, const char* name, const NullGpuField* fields, uint32_t count);
int null_gpu_recording();
uint64_t null_gpu_allocate(uint64_t bytes);
void null_gpu_free(uint64_t address);
}

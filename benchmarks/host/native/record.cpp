// Counters of events and the log of a record: entries (event, name, fields), each field a length and its bytes.
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "null_gpu.h"

namespace {

std::atomic<int64_t> counters[kEvents];
std::atomic<int64_t> allocated_bytes;
std::atomic<bool> recording{false};
std::mutex log_mutex;
std::vector<uint8_t> entries;

constexpr uint64_t kFirstAddress = 0x700000000000, kLastAddress = 0x7e0000000000, kGrain = 512;
std::atomic<uint64_t> next_address{kFirstAddress};

void write(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  entries.insert(entries.end(), bytes, bytes + size);
}

void write(uint32_t number) { write(&number, sizeof number); }

}  // namespace

extern "C" {

void null_gpu_note(uint32_t event, const char* name, const NullGpuField* fields, uint32_t count) {
  counters[event].fetch_add(1, std::memory_order_relaxed);
  if (!recording.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(log_mutex);
  const auto length = static_cast<uint32_t>(std::strlen(name));
  write(event);
  write(length);
  write(name, length);
  write(count);
  for (uint32_t i = 0; i < count; ++i) {
    write(fields[i].size);
    write(fields[i].data, fields[i].size);
  }
}

int null_gpu_recording() { return recording.load(std::memory_order_relaxed); }

void null_gpu_record(int on) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  if (on) entries.clear();
  recording.store(on != 0);
}

const uint8_t* null_gpu_log(uint64_t* size) {
  const std::lock_guard<std::mutex> lock(log_mutex);
  *size = entries.size();
  return entries.data();
}

int64_t null_gpu_count(uint32_t event) { return event < kEvents ? counters[event].load() : allocated_bytes.load(); }

// Addresses are numbers that nothing lies behind. They are handed out upwards and not again, so that a record tells two
// allocations apart; from 14 TiB on they start anew.
uint64_t null_gpu_allocate(uint64_t bytes) {
  const uint64_t grown = (bytes + kGrain - 1) / kGrain * kGrain;
  uint64_t address = next_address.fetch_add(grown, std::memory_order_relaxed);
  if (address + grown > kLastAddress) {
    next_address.store(kFirstAddress + grown);
    address = kFirstAddress;
  }
  allocated_bytes.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
  const NullGpuField fields[] = {NullGpuField::of(address), NullGpuField::of(bytes)};
  null_gpu_note(kAllocate, "", fields, 2);
  return address;
}

void null_gpu_free(uint64_t address) {
  const NullGpuField field = NullGpuField::of(address);
  null_gpu_note(kFree, "", &field, 1);
}

}  // extern "C"

// What a launch over many tensors is told about each of them, passed with the kernel's own arguments: no copy to the
// device, nothing to wait for, and a captured graph keeps it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/block.cuh"

namespace fastlora::cuda {

// Kernels take 32764 bytes of arguments since CUDA 12.1, 4096 before.
#if !defined(__CUDACC__) || CUDART_VERSION >= 12010
constexpr int64_t kTableBytes = 32000;
#else
constexpr int64_t kTableBytes = 3900;
#endif

template <class Entry>
struct Table {
  static constexpr int64_t kCapacity = kTableBytes / static_cast<int64_t>(sizeof(Entry));
  Entry entries[kCapacity];
};

// Calls launch(table, number of its entries, number of the first) once for as many entries as one table holds.
template <class Entry, class Launch>
void for_each_table(const std::vector<Entry>& entries, const Launch& launch) {
  const int64_t count = static_cast<int64_t>(entries.size());
  for (int64_t first = 0; first < count; first += Table<Entry>::kCapacity) {
    const int64_t part = std::min(count - first, Table<Entry>::kCapacity);
    Table<Entry> table{};
    std::copy_n(entries.begin() + first, part, table.entries);
    launch(table, part, first);
  }
}

// The first of `count` entries whose blocks end after this one; end(i): blocks of the entries up to and with i.
template <class End>
__device__ __forceinline__ int64_t entry_of(int64_t block, int64_t count, const End& end) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (end(middle) <= block) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace fastlora::cuda

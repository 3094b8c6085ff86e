// torch's parallel_for by threads that are started and joined: ThreadSanitizer understands those, and not the barriers
// of the OpenMP runtime that torch brings. Preloaded by tools/sanitize.py.

#include <cstdint>
#include <thread>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*call)(int64_t, int64_t, void*),
                                      void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain) {
    threads.emplace_back([=] { call(i, i + grain < end ? i + grain : end, context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// A race on purpose: two calls write the same numbers.
extern "C" int race(int64_t* shared) {
  const auto add = [](int64_t first, int64_t, void* numbers) {
    for (int i = 0; i < 1000; ++i) static_cast<int64_t*>(numbers)[i] += first;
  };
  return torch_parallel_for(0, 2, 1, add, shared);
}

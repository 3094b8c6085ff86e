// Runs CUDA kernels on the host: blocks one after the other, the threads of a block as coroutines that switch only at
// barriers and warp operations, in an order that a seed shuffles and with whole warps held back at random, so that a
// missing barrier shows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define FASTLORA_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulator::run(static_cast<int64_t>(blocks), threads, [&] { kernel(__VA_ARGS__); })

struct EmulatedIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half number) { return static_cast<float>(number.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

namespace emulator {

enum class State { kReady, kWarp, kBlock, kDone };
constexpr int kLanes = 32;
constexpr size_t kStack = 64 << 10;

struct Thread {
  ucontext_t context;  // where it starts; later switches jump, because swapcontext asks the kernel each time
  jmp_buf place;
  bool fresh = true;
  State state = State::kReady;
  std::unique_ptr<char[]> stack;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<uint64_t> given, seen;  // what each lane brought to a warp operation, and what all of them read
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned current = 0;
  std::mt19937 random{0};
};
inline Machine machine;

inline void yield(State state) {
  Thread& self = machine.threads[machine.current];
  self.state = state;
  if (_setjmp(self.place) == 0) _longjmp(machine.scheduler, 1);
}

inline void enter() {
  machine.body();
  machine.threads[machine.current].state = State::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void resume(unsigned index) {
  Thread& thread = machine.threads[index];
  machine.current = threadIdx.x = index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (thread.fresh) {
    thread.fresh = false;
    setcontext(&thread.context);
  }
  _longjmp(thread.place, 1);
}

inline bool release(size_t begin, size_t end, State state) {
  bool found = false;
  for (size_t t = begin; t < end; ++t) {
    const State at = machine.threads[t].state;
    if (at != state && at != State::kDone) return false;
    found |= at == state;
  }
  for (size_t t = begin; t < end && found; ++t) {
    if (machine.threads[t].state == state) machine.threads[t].state = State::kReady;
    if (state == State::kWarp) machine.seen[t] = machine.given[t];
  }
  return found;
}

inline bool all_done() {
  for (const Thread& thread : machine.threads) {
    if (thread.state != State::kDone) return false;
  }
  return true;
}

inline void run_block(std::vector<unsigned>& order) {
  while (!all_done()) {
    std::shuffle(order.begin(), order.end(), machine.random);
    const uint32_t held = machine.random();
    bool waiting = false;
    for (const unsigned t : order) {
      if (machine.threads[t].state != State::kReady) continue;
      if (held >> (t / kLanes) & 1) {
        waiting = true;
        continue;
      }
      resume(t);
    }
    bool moved = waiting;
    const size_t count = machine.threads.size();
    for (size_t t = 0; t < count; t += kLanes) moved |= release(t, std::min(t + kLanes, count), State::kWarp);
    if (!moved && !release(0, count, State::kBlock) && !all_done()) {
      std::fprintf(stderr, "emulator: the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

inline void run(int64_t blocks, int threads, std::function<void()> body) {
  machine.body = std::move(body);
  machine.given.assign(static_cast<size_t>(threads), 0);
  machine.seen = machine.given;
  machine.threads.resize(static_cast<size_t>(threads));
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  std::vector<unsigned> order(static_cast<size_t>(threads));
  for (unsigned t = 0; t < order.size(); ++t) order[t] = t;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (Thread& thread : machine.threads) {
      if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      thread.fresh = true;
      thread.state = State::kReady;
      makecontext(&thread.context, enter, 0);
    }
    run_block(order);
  }
}

// The values that the lanes of this thread's warp brought, after all of them have arrived.
template <class T>
const uint64_t* exchange(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  machine.given[machine.current] = bits;
  yield(State::kWarp);
  return machine.seen.data() + machine.current / kLanes * kLanes;
}

template <class T>
T lane_value(const uint64_t* values, int lane) {
  T value;
  std::memcpy(&value, values + lane, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(machine.current % kLanes); }

}  // namespace emulator

inline void __syncthreads() { emulator::yield(emulator::State::kBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::exchange(0); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = emulator::lane();
  return emulator::lane_value<T>(emulator::exchange(value), lane >= step ? lane - step : lane);
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::lane_value<T>(emulator::exchange(value), from);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulator::lane();
  return emulator::lane_value<T>(emulator::exchange(value), lane ^ mask);
}

template <class T>
unsigned __match_any_sync(unsigned, T value) {
  const uint64_t* values = emulator::exchange(value);
  unsigned peers = 0;
  for (int i = 0; i < emulator::kLanes; ++i) peers |= (emulator::lane_value<T>(values, i) == value ? 1u : 0u) << i;
  return peers;
}

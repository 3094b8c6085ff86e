// A call plan: what one direction of an adapted linear does on a GPU, written down once and run by one native call.
// No torch types: `fastlora._plan` builds plans from Python, the operators of `fastlora/_C.so` run them.
#pragma once
#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

// A tensor of torch's C API.
struct AtenTensorOpaque;

namespace fastlora::plan {

// Of every type below. The two libraries share memory, so they compare it before they do.
constexpr int64_t kFormat = 3;

// A tensor of a run: the inputs come first, then the constants, then what the steps make. -1: none.
using Slot = int32_t;

// Uninitialised memory on the device of the plan, or zeros.
struct Allocate {
  Slot out;
  int32_t dtype;  // index into kDtypes
  bool zero;
  std::vector<int64_t> sizes, strides;
};

// Every element of `out` becomes the number.
struct Fill {
  Slot out;
  double number;
};

// Another shape of the memory of `base`; offset counts elements from its first.
struct View {
  Slot out, base;
  std::vector<int64_t> sizes, strides;
  int64_t offset;
};

// out = added + a b by the library's matmul, or a b where nothing is added; `added` may be `out`.
struct Multiply {
  Slot out, added, a, b;
};

struct Argument {
  enum class Kind : uint8_t { kNone, kTensor, kTensors, kInt, kInts, kFloat, kBool, kDtype };
  Kind kind;
  bool optional;  // by the operator's schema
  std::vector<Slot> slots;
  std::vector<int64_t> ints;
  double number;
};

// Any other operator, through the dispatcher; -1 among the results: not kept.
struct Call {
  std::string name, overload;
  std::vector<Argument> arguments;
  std::vector<Slot> results;
};

// The address of a tensor's element as an argument of a kernel: bytes count from the tensor's first.
struct Hole {
  int32_t position;
  Slot slot;
  int64_t bytes;
};

// CUlaunchAttribute
struct Attribute {
  int32_t id;
  int32_t padding;
  uint32_t value[16];
};
static_assert(sizeof(Attribute) == 72);

// One start of a compiled kernel. A value is the first bytes of its word; of holes it is filled in at every run.
struct Launch {
  std::string name;
  uint64_t function;
  uint32_t grid[3], block[3], shared_bytes;
  std::vector<Attribute> attributes;
  std::vector<uint64_t> values;
  std::vector<Hole> holes;
};

struct Step {
  std::variant<Allocate, Fill, View, Multiply, Call, Launch> action;
  std::vector<Slot> released;  // not needed by any later step
};

struct Plan {
  int32_t inputs = 0, constants = 0, slots = 0;
  size_t most_values = 0;
  std::vector<Step> steps;
  std::vector<Slot> results;
};

// Element types by name; their numbers in torch are looked up by name too.
constexpr const char* kDtypes[] = {"float32", "bfloat16", "float16", "float64", "int64",
                                   "int32",   "int16",    "int8",    "uint8",   "bool"};
constexpr int32_t kDtypeCount = sizeof(kDtypes) / sizeof(kDtypes[0]);

// A plan with the inputs that it is for, and the tensors that it keeps (handles of the library that runs it).
struct Entry {
  uint64_t hash;
  std::vector<int64_t> key;
  std::shared_ptr<const Plan> plan;
  std::shared_ptr<void> constants;
};

// The plans of one owner, the last used first. Of two keys with one hash the later one stays.
struct Cache {
  size_t capacity;
  std::mutex mutex;
  std::list<Entry> entries;
  std::unordered_map<uint64_t, std::list<Entry>::iterator> by_hash;
};

// Runs the plan of a cache that is for tensors like these, and gives its results, null where a result is none; false:
// there is no such plan. Inputs stay the caller's, results become so.
using RunPlan = bool (*)(int64_t cache, int64_t variant, const std::vector<AtenTensorOpaque*>& inputs,
                         std::vector<AtenTensorOpaque*>& results);

// Plans and caches that are alive, by number: a number can be wrong, but it never leads into freed memory.
struct Registry {
  int64_t format = kFormat;
  std::atomic<RunPlan> run = nullptr;  // once the library that runs plans is there
  std::mutex mutex;
  int64_t next = 1;
  std::unordered_map<int64_t, std::weak_ptr<const Plan>> plans;
  std::unordered_map<int64_t, std::weak_ptr<Cache>> caches;

  std::shared_ptr<const Plan> plan(int64_t number) { return find(plans, number); }
  std::shared_ptr<Cache> cache(int64_t number) { return find(caches, number); }

  int64_t add(const std::shared_ptr<const Plan>& plan) { return add(plans, plan); }
  int64_t add(const std::shared_ptr<Cache>& cache) { return add(caches, cache); }

 private:
  template <class T>
  std::shared_ptr<T> find(std::unordered_map<int64_t, std::weak_ptr<T>>& from, int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = from.find(number);
    return found == from.end() ? nullptr : found->second.lock();
  }
  template <class T>
  int64_t add(std::unordered_map<int64_t, std::weak_ptr<T>>& to, const std::shared_ptr<T>& item) {
    const std::lock_guard<std::mutex> lock(mutex);
    std::erase_if(to, [](const auto& entry) { return entry.second.expired(); });
    to.emplace(next, item);
    return next++;
  }
};

}  // namespace fastlora::plan

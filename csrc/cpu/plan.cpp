// Runs call plans: finds the one that is for the inputs, allocates, calls the library and starts the kernels.
#include "plan.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>

#include "cpu/driver.h"

namespace fastlora::plan {
namespace {

template <class T>
StableIValue pack(T value) {
  return torch::stable::detail::from(std::move(value));
}

template <class T>
T unpack(StableIValue value) {
  return torch::stable::detail::to<T>(value);
}

Registry* registry = nullptr;
const Driver* driver = nullptr;

// Deprecated in torch's headers and so looked up: an addmm through the dispatcher would need a Scalar, which the stable
// ABI does not have.
using Addmm = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, float, float);
using Mm = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
using Fill_ = AOTITorchError (*)(AtenTensorHandle, double);
Addmm addmm_out = nullptr;
Mm mm_out = nullptr;
Fill_ fill_with = nullptr;

const std::vector<int32_t>& dtype_codes() {
  static const std::vector<int32_t> codes = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(), aoti_torch_dtype_float64(),
      aoti_torch_dtype_int64(),   aoti_torch_dtype_int32(),    aoti_torch_dtype_int16(),   aoti_torch_dtype_int8(),
      aoti_torch_dtype_uint8(),   aoti_torch_dtype_bool()};
  return codes;
}

void release(AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }

AtenTensorHandle share(AtenTensorHandle handle) {
  AtenTensorHandle copy = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &copy));
  return copy;
}

char* address(AtenTensorHandle handle) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
  return static_cast<char*>(data);
}

struct Device {
  int32_t type = -1, index = -1;

  bool operator==(const Device&) const = default;
};

Device device_of(AtenTensorHandle handle) {
  Device device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device.index));
  return device;
}

// Handles that are deleted in the end, but for empty ones.
struct Handles {
  std::vector<AtenTensorHandle> all;

  Handles() = default;
  Handles(const Handles&) = delete;
  ~Handles() {
    for (const AtenTensorHandle handle : all) {
      if (handle != nullptr) release(handle);
    }
  }
};

// The elements of a `Tensor[]`, which is used up.
void take(StableIValue value, Handles& out) {
  const auto list = unpack<StableListHandle>(value);
  const std::unique_ptr<std::remove_pointer_t<StableListHandle>, decltype(&torch_delete_list)> owner(list,
                                                                                                     torch_delete_list);
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  out.all.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    out.all.push_back(unpack<AtenTensorHandle>(element));
  }
}

// What a plan depends on: of every input its device, dtype, sizes, strides and whether it starts on 16 bytes.
std::vector<int64_t> key_of(int64_t variant, const std::vector<AtenTensorHandle>& inputs) {
  std::vector<int64_t> key;
  key.reserve(1 + 6 * inputs.size());
  key.push_back(variant);
  for (const AtenTensorHandle input : inputs) {
    int32_t dtype = 0;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(input, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(input, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(input, &strides));
    const Device device = device_of(input);
    const int64_t aligned = reinterpret_cast<uintptr_t>(address(input)) % 16 == 0;
    key.push_back(dim | aligned << 16 | int64_t{dtype} << 24 | int64_t{device.type} << 40 |
                  int64_t{device.index} << 52);
    key.insert(key.end(), sizes, sizes + dim);
    key.insert(key.end(), strides, strides + dim);
  }
  return key;
}

uint64_t hash_of(const std::vector<int64_t>& key) {
  uint64_t hash = 1469598103934665603u;
  for (const int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211u;
  return hash;
}

// The entry for a key, moved to the front; null: there is none.
Entry find(Cache& cache, const std::vector<int64_t>& key) {
  const uint64_t hash = hash_of(key);
  const std::lock_guard<std::mutex> lock(cache.mutex);
  const auto found = cache.by_hash.find(hash);
  if (found == cache.by_hash.end() || found->second->key != key) return {hash, {}, nullptr, nullptr};
  cache.entries.splice(cache.entries.begin(), cache.entries, found->second);
  return {hash, {}, found->second->plan, found->second->constants};
}

void* current_stream(const Device& device) {
  if (device.type != aoti_torch_device_type_cuda()) {
    StreamHandle stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(device.index, &stream));
    int64_t number = 0;
    const AOTITorchError failed = aoti_torch_stream_id(stream, &number);
    aoti_torch_delete_stream(stream);
    TORCH_ERROR_CODE_CHECK(failed);
    return reinterpret_cast<void*>(number);
  }
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "native launch: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device.index, &stream));
  return stream;
}

// Makes the device current until the end, as every launch needs.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t index) {
    int32_t before = index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&before));
    if (before != index) TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index, &guard_));
  }
  CurrentDevice(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

class Run {
 public:
  Run(const Plan& plan, const std::vector<AtenTensorHandle>& inputs, const std::vector<AtenTensorHandle>& constants)
      : plan_(plan), inputs_(inputs), constants_(constants), device_(device_of(inputs[0])) {
    tensors_.all.resize(static_cast<size_t>(plan.slots), nullptr);
    addresses_.resize(tensors_.all.size(), nullptr);
  }

  // The results, which the caller deletes; null where there is none.
  std::vector<AtenTensorHandle> operator()() {
    if (plan_.most_values == 0) {
      all_steps();
    } else {
      const CurrentDevice guard(device_.index);
      driver->enter(device_.index);
      stream_ = current_stream(device_);
      values_.resize(plan_.most_values);
      params_.resize(plan_.most_values);
      for (size_t i = 0; i < params_.size(); ++i) params_[i] = &values_[i];
      all_steps();
    }
    return results();
  }

 private:
  void all_steps() {
    for (const Step& step : plan_.steps) {
      std::visit([this](const auto& action) { perform(action); }, step.action);
      for (const Slot slot : step.released) {
        release(std::exchange(tensors_.all[static_cast<size_t>(slot)], nullptr));
      }
    }
  }

  AtenTensorHandle at(Slot slot) const {
    if (slot < plan_.inputs) return inputs_[static_cast<size_t>(slot)];
    const int32_t constant = slot - plan_.inputs;
    return constant < plan_.constants ? constants_[static_cast<size_t>(constant)]
                                      : tensors_.all[static_cast<size_t>(slot)];
  }

  char* address_of(Slot slot) {
    char*& known = addresses_[static_cast<size_t>(slot)];
    if (known == nullptr) known = address(at(slot));
    return known;
  }

  void put(Slot slot, AtenTensorHandle handle) { tensors_.all[static_cast<size_t>(slot)] = handle; }

  void perform(const Allocate& step) {
    AtenTensorHandle made = nullptr;
    const int32_t dtype = dtype_codes()[static_cast<size_t>(step.dtype)];
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(step.sizes.size()), step.sizes.data(),
                                                    step.strides.data(), dtype, device_.type, device_.index, &made));
    put(step.out, made);
    if (step.zero) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(made));
  }

  void perform(const Fill& step) { TORCH_ERROR_CODE_CHECK(fill_with(at(step.out), step.number)); }

  void perform(const View& step) {
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(at(step.base), static_cast<int64_t>(step.sizes.size()),
                                                          step.sizes.data(), step.strides.data(), step.offset, &made));
    put(step.out, made);
  }

  void perform(const Multiply& step) {
    if (step.added == -1) {
      TORCH_ERROR_CODE_CHECK(mm_out(at(step.out), at(step.a), at(step.b)));
    } else {
      TORCH_ERROR_CODE_CHECK(addmm_out(at(step.out), at(step.added), at(step.a), at(step.b), 1.0f, 1.0f));
    }
  }

  void perform(const Call& step) {
    std::vector<StableIValue> stack(std::max(step.arguments.size(), step.results.size()));
    for (size_t i = 0; i < step.arguments.size(); ++i) stack[i] = stable(step.arguments[i]);
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(step.name.c_str(), step.overload.c_str(), stack.data(), TORCH_ABI_VERSION));
    for (size_t i = 0; i < step.results.size(); ++i) {
      const auto made = unpack<AtenTensorHandle>(stack[i]);
      if (step.results[i] == -1) {
        release(made);
      } else {
        put(step.results[i], made);
      }
    }
  }

  void perform(const Launch& step) {
    std::memcpy(values_.data(), step.values.data(), step.values.size() * sizeof(uint64_t));
    for (const Hole& hole : step.holes) {
      values_[static_cast<size_t>(hole.position)] = reinterpret_cast<uint64_t>(address_of(hole.slot) + hole.bytes);
    }
    driver->start(step, stream_, params_.data());
  }

  StableIValue stable(const Argument& argument) const {
    if (argument.kind == Argument::Kind::kNone) return pack(std::nullopt);
    const StableIValue value = plain(argument);
    return argument.optional ? pack(std::optional<StableIValue>(value)) : value;
  }

  StableIValue plain(const Argument& argument) const {
    switch (argument.kind) {
      case Argument::Kind::kTensor:
        return pack(share(at(argument.slots[0])));
      case Argument::Kind::kTensors: {
        StableListHandle list = nullptr;
        TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(argument.slots.size(), &list));
        for (const Slot slot : argument.slots) {
          TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, pack(share(at(slot)))));
        }
        return pack(list);
      }
      case Argument::Kind::kInt:
        return pack(argument.ints[0]);
      case Argument::Kind::kInts:
        return pack(argument.ints);
      case Argument::Kind::kFloat:
        return pack(argument.number);
      case Argument::Kind::kBool:
        return pack(argument.ints[0] != 0);
      default:
        return pack(dtype_codes()[static_cast<size_t>(argument.ints[0])]);
    }
  }

  std::vector<AtenTensorHandle> results() {
    std::vector<AtenTensorHandle> found;
    for (auto slot = plan_.results.begin(); slot != plan_.results.end(); ++slot) {
      if (*slot == -1) {
        found.push_back(nullptr);
      } else if (*slot < plan_.inputs + plan_.constants ||
                 std::find(slot + 1, plan_.results.end(), *slot) != plan_.results.end()) {
        found.push_back(share(at(*slot)));
      } else {
        found.push_back(std::exchange(tensors_.all[static_cast<size_t>(*slot)], nullptr));
      }
    }
    return found;
  }

  const Plan& plan_;
  const std::vector<AtenTensorHandle>&inputs_, &constants_;
  Handles tensors_;  // by slot; those of inputs and constants are empty
  std::vector<char*> addresses_;
  std::vector<uint64_t> values_;
  std::vector<void*> params_;
  Device device_;
  void* stream_ = nullptr;
};

Registry& plans() {
  STD_TORCH_CHECK(registry != nullptr && driver != nullptr, "plans: call open_plans first");
  return *registry;
}

bool run_kept(int64_t number, int64_t variant, const std::vector<AtenTensorHandle>& inputs,
              std::vector<AtenTensorHandle>& results) {
  const std::shared_ptr<Cache> cache = plans().cache(number);
  STD_TORCH_CHECK(cache != nullptr, "cache: expected the number of one that is alive");
  const Entry entry = find(*cache, key_of(variant, inputs));
  if (entry.plan == nullptr) return false;
  results = Run(*entry.plan, inputs, static_cast<const Handles*>(entry.constants.get())->all)();
  return true;
}

// Written out instead of TORCH_BOX, which would make three more objects of every tensor.
void run_plan(StableIValue* stack, uint64_t, uint64_t) {
  Handles inputs, results;
  take(stack[2], inputs);
  run_kept(unpack<int64_t>(stack[0]), unpack<int64_t>(stack[1]), inputs.all, results.all);
  StableListHandle list = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(results.all.size(), &list));
  for (AtenTensorHandle& result : results.all) {
    if (result == nullptr) TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&result));
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, pack(std::exchange(result, nullptr))));
  }
  stack[0] = pack(list);
}

void keep_plan(StableIValue* stack, uint64_t, uint64_t) {
  Handles inputs;
  take(stack[3], inputs);
  const auto constants = std::make_shared<Handles>();
  take(stack[4], *constants);
  const std::shared_ptr<Cache> cache = plans().cache(unpack<int64_t>(stack[0]));
  const std::shared_ptr<const Plan> plan = plans().plan(unpack<int64_t>(stack[2]));
  STD_TORCH_CHECK(cache != nullptr, "cache: expected the number of one that is alive");
  STD_TORCH_CHECK(plan != nullptr, "plan: expected the number of one that is alive");
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.all.size()) == plan->inputs, "inputs: expected ", plan->inputs, ", got ",
                  inputs.all.size());
  STD_TORCH_CHECK(static_cast<int64_t>(constants->all.size()) == plan->constants, "constants: expected ",
                  plan->constants, ", got ", constants->all.size());
  std::vector<int64_t> key = key_of(unpack<int64_t>(stack[1]), inputs.all);
  const uint64_t hash = hash_of(key);
  std::list<Entry> dropped;  // freed without the lock
  const std::lock_guard<std::mutex> lock(cache->mutex);
  const auto drop = [&](std::list<Entry>::iterator entry) {
    cache->by_hash.erase(entry->hash);
    dropped.splice(dropped.end(), cache->entries, entry);
  };
  if (const auto old = cache->by_hash.find(hash); old != cache->by_hash.end()) drop(old->second);
  while (cache->entries.size() >= cache->capacity) drop(std::prev(cache->entries.end()));
  cache->entries.push_front({hash, std::move(key), plan, constants});
  cache->by_hash.emplace(hash, cache->entries.begin());
}

// Connects the plans of `fastlora._plan` and a libcuda; why they cannot run, or nothing.
std::string open_plans(int64_t place, const std::string& library) {
  const auto found = reinterpret_cast<Registry*>(place);
  if (found->format != kFormat) return "fastlora._plan and the native library are of different builds";
  addmm_out = reinterpret_cast<Addmm>(dlsym(RTLD_DEFAULT, "aoti_torch_addmm_out"));
  mm_out = reinterpret_cast<Mm>(dlsym(RTLD_DEFAULT, "aoti_torch_mm_out"));
  fill_with = reinterpret_cast<Fill_>(dlsym(RTLD_DEFAULT, "aoti_torch_aten_fill__Scalar"));
  if (addmm_out == nullptr || mm_out == nullptr || fill_with == nullptr) {
    return "this torch's stable ABI has no matmul or no fill";
  }
  auto opened = std::make_unique<const Driver>(library);
  if (!opened->reason().empty()) return opened->reason();
  registry = found;
  driver = opened.release();  // never closed: functions of it may be running
  registry->run = &run_kept;
  return "";
}

}  // namespace
}  // namespace fastlora::plan

STABLE_TORCH_LIBRARY_IMPL(fastlora, CompositeExplicitAutograd, m) {
  m.impl("run_plan", &fastlora::plan::run_plan);
  m.impl("keep_plan", &fastlora::plan::keep_plan);
  m.impl("open_plans", TORCH_BOX(&fastlora::plan::open_plans));
}

// Plans for Python, which writes them down. The module has no tensors in it, so it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "plan.h"

namespace py = pybind11;

namespace fastlora::plan {
namespace {

Registry& registry() {
  // Never destroyed: caches may outlive the module's own globals at exit.
  static Registry* const found = new Registry;
  return *found;
}

std::invalid_argument wrong(const std::string& name, const std::string& expected, int64_t got) {
  return std::invalid_argument(name + ": expected " + expected + ", got " + std::to_string(got));
}

int32_t dtype_index(const std::string& name) {
  const auto* end = kDtypes + kDtypeCount;
  const auto* found = std::find(kDtypes, end, name);
  if (found == end) throw std::invalid_argument("dtype: expected a type that plans know, got " + name);
  return static_cast<int32_t>(found - kDtypes);
}

// Takes the steps in order and refuses what a run could not do: a slot that holds no tensor yet or no more.
class Builder {
 public:
  Builder(int32_t inputs, int32_t constants) {
    if (inputs < 1) throw wrong("inputs", "1 or more", inputs);
    if (constants < 0) throw wrong("constants", "0 or more", constants);
    plan_->inputs = inputs;
    plan_->constants = constants;
    held_.assign(static_cast<size_t>(inputs + constants), true);
  }

  Slot allocate(const std::string& dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides, bool zero) {
    if (sizes.size() != strides.size()) throw wrong("strides", "one for each size", static_cast<int64_t>(strides.size()));
    for (const int64_t size : sizes) {
      if (size < 0) throw wrong("sizes", "0 or more", size);
    }
    const int32_t index = dtype_index(dtype);
    const Slot out = make();
    add(Allocate{out, index, zero, std::move(sizes), std::move(strides)});
    return out;
  }

  Slot view(Slot base, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset) {
    if (sizes.size() != strides.size()) throw wrong("strides", "one for each size", static_cast<int64_t>(strides.size()));
    check("base", base);
    const Slot out = make();
    add(View{out, base, std::move(sizes), std::move(strides), offset});
    return out;
  }

  void multiply(Slot out, Slot added, Slot a, Slot b) {
    for (const Slot slot : {out, a, b}) check("operand", slot);
    if (added != -1) check("added", added);
    add(Multiply{out, added, a, b});
  }

  // arguments: (kind, optional, value); results: which are kept. Returns the slots of those.
  std::vector<Slot> call(const std::string& name, const std::string& overload, const py::list& arguments,
                         const std::vector<bool>& results) {
    Call call{name, overload, {}, {}};
    for (const py::handle& item : arguments) call.arguments.push_back(argument(item));
    std::vector<Slot> kept;
    for (const bool keep : results) {
      call.results.push_back(keep ? make() : -1);
      if (keep) kept.push_back(call.results.back());
    }
    add(std::move(call));
    return kept;
  }

  void launch(const std::string& name, uint64_t function, const std::vector<uint32_t>& grid,
              const std::vector<uint32_t>& block, uint32_t shared_bytes,
              const std::vector<std::pair<int32_t, std::vector<uint32_t>>>& attributes, std::vector<uint64_t> values,
              const std::vector<std::tuple<int32_t, Slot, int64_t>>& holes) {
    if (grid.size() != 3) throw wrong("grid", "3 numbers", static_cast<int64_t>(grid.size()));
    if (block.size() != 3) throw wrong("block", "3 numbers", static_cast<int64_t>(block.size()));
    Launch launch{name, function, {}, {}, shared_bytes, {}, std::move(values), {}};
    std::copy_n(grid.begin(), 3, launch.grid);
    std::copy_n(block.begin(), 3, launch.block);
    for (const auto& [id, words] : attributes) {
      if (words.size() > 16) throw wrong("attributes", "at most 16 words", static_cast<int64_t>(words.size()));
      Attribute attribute{id, 0, {}};
      std::copy(words.begin(), words.end(), attribute.value);
      launch.attributes.push_back(attribute);
    }
    for (const auto& [position, slot, bytes] : holes) {
      if (position < 0 || position >= static_cast<int64_t>(launch.values.size())) {
        throw wrong("holes", "a position among the " + std::to_string(launch.values.size()) + " values", position);
      }
      check("holes", slot);
      launch.holes.push_back({position, slot, bytes});
    }
    plan_->most_values = std::max(plan_->most_values, launch.values.size());
    add(std::move(launch));
  }

  void release(const std::vector<Slot>& slots) {
    if (plan_->steps.empty()) throw std::invalid_argument("slots: expected a step that they are released after");
    for (const Slot slot : slots) {
      check("slots", slot);
      if (slot < plan_->inputs + plan_->constants) throw wrong("slots", "tensors that the plan made", slot);
      held_[static_cast<size_t>(slot)] = false;
      plan_->steps.back().released.push_back(slot);
    }
  }

  // The finished plan; nothing can be added any more.
  std::shared_ptr<const Plan> finish(std::vector<Slot> results) {
    for (const Slot slot : results) {
      if (slot != -1) check("results", slot);
    }
    plan_->results = std::move(results);
    plan_->slots = static_cast<int32_t>(held_.size());
    std::shared_ptr<const Plan> done = std::move(plan_);
    plan_ = std::make_shared<Plan>();
    held_.clear();
    return done;
  }

 private:
  template <class Action>
  void add(Action&& action) {
    plan_->steps.push_back({std::forward<Action>(action), {}});
  }

  Slot make() {
    held_.push_back(true);
    return static_cast<Slot>(held_.size() - 1);
  }

  void check(const char* name, Slot slot) const {
    if (slot < 0 || slot >= static_cast<int64_t>(held_.size()) || !held_[static_cast<size_t>(slot)]) {
      throw wrong(name, "a slot that holds a tensor", slot);
    }
  }

  Argument argument(const py::handle& item) const {
    const auto [kind, optional, value] = item.cast<std::tuple<std::string, bool, py::object>>();
    Argument made{Argument::Kind::kNone, optional, {}, {}, 0.0};
    if (kind == "tensor") {
      made.kind = Argument::Kind::kTensor;
      made.slots = {value.cast<Slot>()};
    } else if (kind == "tensors") {
      made.kind = Argument::Kind::kTensors;
      made.slots = value.cast<std::vector<Slot>>();
    } else if (kind == "int") {
      made.kind = Argument::Kind::kInt;
      made.ints = {value.cast<int64_t>()};
    } else if (kind == "ints") {
      made.kind = Argument::Kind::kInts;
      made.ints = value.cast<std::vector<int64_t>>();
    } else if (kind == "float") {
      made.kind = Argument::Kind::kFloat;
      made.number = value.cast<double>();
    } else if (kind == "bool") {
      made.kind = Argument::Kind::kBool;
      made.ints = {value.cast<bool>()};
    } else if (kind == "dtype") {
      made.kind = Argument::Kind::kDtype;
      made.ints = {dtype_index(value.cast<std::string>())};
    } else if (kind != "none") {
      throw std::invalid_argument("arguments: expected a kind that plans know, got " + kind);
    }
    for (const Slot slot : made.slots) check("arguments", slot);
    return made;
  }

  std::shared_ptr<Plan> plan_ = std::make_shared<Plan>();
  std::vector<bool> held_;  // by slot: whether it holds a tensor after the steps so far
};

// Python's reference to a plan; caches have their own.
struct PlanHandle {
  std::shared_ptr<const Plan> plan;
  int64_t number;
};

struct CacheHandle {
  std::shared_ptr<Cache> cache;
  int64_t number;

  explicit CacheHandle(int64_t capacity) : cache(std::make_shared<Cache>()) {
    if (capacity < 1) throw wrong("capacity", "1 or more plans", capacity);
    cache->capacity = static_cast<size_t>(capacity);
    number = registry().add(cache);
  }
  size_t size() const {
    const std::lock_guard<std::mutex> lock(cache->mutex);
    return cache->entries.size();
  }
  void clear() const {
    std::list<Entry> dropped;  // freed without the lock
    const std::lock_guard<std::mutex> lock(cache->mutex);
    dropped.swap(cache->entries);
    cache->by_hash.clear();
  }
};

}  // namespace
}  // namespace fastlora::plan

PYBIND11_MODULE(_plan, m) {
  using namespace fastlora::plan;
  m.doc() = "Call plans of fastlora.ops.backends.plan, which torch.ops.fastlora.run_plan runs.";
  m.def("registry", [] { return reinterpret_cast<int64_t>(&registry()); }, "Where plans and caches are listed.");
  m.def("alive", [](int64_t number) { return registry().plan(number) != nullptr; }, py::arg("plan"),
        "Whether somebody keeps the plan with this number.");
  py::class_<PlanHandle>(m, "Plan", "A finished plan.").def_readonly("number", &PlanHandle::number);
  py::class_<CacheHandle>(m, "Cache", "The plans of one owner, at most ``capacity``: the last used stay.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def_readonly("number", &CacheHandle::number)
      .def("clear", &CacheHandle::clear)
      .def("__len__", &CacheHandle::size);
  py::class_<Builder>(m, "Builder",
                      "Takes a plan's steps in order. Slots name tensors: inputs, constants, then what steps make.\n\n"
                      "Raises ValueError for a slot that holds no tensor at that step, and for sizes that do not fit.")
      .def(py::init<int32_t, int32_t>(), py::arg("inputs"), py::arg("constants"))
      .def("allocate", &Builder::allocate, py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("zero"))
      .def("view", &Builder::view, py::arg("base"), py::arg("sizes"), py::arg("strides"), py::arg("offset"))
      .def("multiply", &Builder::multiply, py::arg("out"), py::arg("added"), py::arg("a"), py::arg("b"))
      .def("call", &Builder::call, py::arg("name"), py::arg("overload"), py::arg("arguments"), py::arg("results"))
      .def("launch", &Builder::launch, py::arg("name"), py::arg("function"), py::arg("grid"), py::arg("block"),
           py::arg("shared_bytes"), py::arg("attributes"), py::arg("values"), py::arg("holes"))
      .def("release", &Builder::release, py::arg("slots"))
      .def(
          "finish",
          [](Builder& self, std::vector<Slot> results) {
            auto plan = self.finish(std::move(results));
            const int64_t number = registry().add(plan);
            return PlanHandle{std::move(plan), number};
          },
          py::arg("results"));
}

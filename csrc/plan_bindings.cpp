// Plans for Python, which writes them down. The module has no tensors in it, so it needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "plan_builder.h"

namespace py = pybind11;

namespace fastlora::plan {
namespace {

Registry& registry() {
  // Never destroyed: caches may outlive the module's own globals at exit.
  static Registry* const found = new Registry;
  return *found;
}

// (kind, optional, value)
Argument argument_of(const py::handle& item) {
  const auto [kind, optional, value] = item.cast<std::tuple<std::string, bool, py::object>>();
  std::vector<int64_t> ints;
  double number = 0.0;
  std::string dtype;
  if (kind == "float") {
    number = value.cast<double>();
  } else if (kind == "dtype") {
    dtype = value.cast<std::string>();
  } else if (kind == "tensors" || kind == "ints") {
    ints = value.cast<std::vector<int64_t>>();
  } else if (kind != "none") {
    ints = {value.cast<int64_t>()};
  }
  return argument(kind, optional, std::move(ints), number, dtype);
}

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
};

PlanHandle finish(Builder& builder, std::vector<Slot> results) {
  auto plan = builder.finish(std::move(results));
  const int64_t number = registry().add(plan);
  return {std::move(plan), number};
}

std::optional<PlanHandle> find(int64_t number) {
  auto plan = registry().plan(number);
  if (plan == nullptr) return std::nullopt;
  return PlanHandle{std::move(plan), number};
}

std::vector<Slot> call(Builder& builder, const std::string& name, const std::string& overload,
                       const py::list& arguments, const std::vector<bool>& results) {
  std::vector<Argument> made;
  for (const py::handle& item : arguments) made.push_back(argument_of(item));
  return builder.call(name, overload, std::move(made), results);
}

}  // namespace
}  // namespace fastlora::plan

PYBIND11_MODULE(_plan, m) {
  using namespace fastlora::plan;
  m.doc() = "Call plans of fastlora.ops.backends.plan, which torch.ops.fastlora.run_plan runs.";
  m.def("registry", [] { return reinterpret_cast<int64_t>(&registry()); }, "Where plans and caches are listed.");
  py::class_<PlanHandle>(m, "Plan", "A finished plan.").def_readonly("number", &PlanHandle::number);
  m.def("find", &find, py::arg("number"), "The plan with this number, None where nobody keeps it any more.");
  py::class_<CacheHandle>(m, "Cache", "The plans of one owner, at most ``capacity``: the last used stay.")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def_readonly("number", &CacheHandle::number)
      .def("__len__", &CacheHandle::size);
  py::class_<Builder>(m, "Builder",
                      "Takes a plan's steps in order. Slots name tensors: inputs, constants, then what steps make.\n\n"
                      "Raises ValueError for a slot that holds no tensor at that step, and for sizes that do not fit.")
      .def(py::init<int32_t, int32_t>(), py::arg("inputs"), py::arg("constants"))
      .def("allocate", &Builder::allocate, py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("zero"))
      .def("fill", &Builder::fill, py::arg("out"), py::arg("number"))
      .def("view", &Builder::view, py::arg("base"), py::arg("sizes"), py::arg("strides"), py::arg("offset"))
      .def("multiply", &Builder::multiply, py::arg("out"), py::arg("added"), py::arg("a"), py::arg("b"))
      .def("call", &call, py::arg("name"), py::arg("overload"), py::arg("arguments"), py::arg("results"))
      .def("launch", &Builder::launch, py::arg("name"), py::arg("function"), py::arg("grid"), py::arg("block"),
           py::arg("shared_bytes"), py::arg("attributes"), py::arg("values"), py::arg("holes"))
      .def("release", &Builder::release, py::arg("slots"))
      .def("finish", &finish, py::arg("results"));
}

// What an adapted group is before its input is there: its tensors, plans of its calls, what watches over both.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>

namespace py = pybind11;

namespace fastlora::node {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// What a backward is asked for, a bit each.
enum Need : unsigned { kX = 1, kA = 2, kB = 4, kZ = 8, kNeeds = 16 };

// The plans of calls that differ in nothing but their tensors, by number; -1: there is none.
struct Plans {
  std::atomic<int64_t> cache{-1}, forward{-1};
  std::array<std::atomic<int64_t>, kNeeds> backward;

  Plans() { forget(); }
  void forget() {
    forward = -1;
    for (auto& variant : backward) variant = -1;
  }
  void keep(int64_t number, int64_t need, int64_t variant) {
    if (cache.exchange(number) != number) forget();
    (need < 0 ? forward : backward.at(static_cast<size_t>(need))) = variant;
  }
};

// Tensors that somebody in Python keeps. A reference from here would hide cycles from Python's collector, and stand in
// the way of ``torch.utils.swap_tensors``.
struct Borrowed {
  std::vector<PyObject*> objects;

  explicit Borrowed(const py::sequence& owner) {
    for (const py::handle item : owner) {
      if (!item.is_none() && !THPVariable_Check(item.ptr())) throw py::type_error("expected tensors");
      objects.push_back(item.ptr());
    }
  }
  size_t size() const { return objects.size(); }
  const Tensor& operator[](size_t i) const { return THPVariable_Unpack(objects[i]); }
  bool has(size_t i) const { return objects[i] != Py_None; }
  void append_to(Tensors& out) const {
    for (size_t i = 0; i < size(); ++i) {
      if (has(i)) out.push_back((*this)[i]);
    }
  }
  Tensors tensors() const {
    Tensors out;
    out.reserve(size());
    append_to(out);
    return out;
  }
};

// The tensors of a group that are there before its input is: those of a ``BoundCall``, which each ``Call`` keeps.
struct Group {
  Borrowed W, bias, A, B, counted;
  std::vector<int64_t> outputs, columns, streams;
  std::vector<double> scales;

  Group(const py::sequence& weights, const py::sequence& biases, const py::sequence& a, const py::sequence& b,
        const py::sequence& versioned, std::vector<int64_t> output_of, std::vector<int64_t> column_of,
        std::vector<double> scale_of, std::vector<int64_t> stream_of)
      : W(weights),
        bias(biases),
        A(a),
        B(b),
        counted(versioned),
        outputs(std::move(output_of)),
        columns(std::move(column_of)),
        streams(std::move(stream_of)),
        scales(std::move(scale_of)) {}

  bool trains_base() const {
    for (const Borrowed* part : {&W, &bias}) {
      for (size_t i = 0; i < part->size(); ++i) {
        if (part->has(i) && (*part)[i].requires_grad()) return true;
      }
    }
    return false;
  }

  // [*y, h, *moments]; nothing where the native library has no such call. seed: of dropout with probability p.
  Tensors forward(const Tensor& x, const std::optional<Tensor>& P, bool moments, const std::optional<Tensor>& seed,
                  double p) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastlora::linear_lora_forward", "");
    std::vector<std::optional<Tensor>> biases(bias.size());
    for (size_t i = 0; i < bias.size(); ++i) {
      if (bias.has(i)) biases[i] = bias[i];
    }
    c10::Stack stack{x,       W.tensors(), std::move(biases), A.tensors(), P, B.tensors(), outputs,
                     columns, scales,      moments,           seed,        p, streams};
    op.callBoxed(stack);
    return stack[0].toTensorVector();
  }

  Tensors backward(const Tensors& dy, const Tensor& x, const Tensor& h, const Tensors& a, const Tensors& b,
                   int64_t probes, unsigned need, const std::optional<Tensor>& seed, double p) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastlora::linear_lora_backward", "");
    c10::Stack stack{dy,
                     x,
                     h,
                     W.tensors(),
                     a,
                     b,
                     outputs,
                     columns,
                     scales,
                     need & kZ ? probes : int64_t{0},
                     (need & kX) != 0,
                     (need & kA) != 0,
                     (need & kB) != 0,
                     seed,
                     p,
                     streams};
    op.callBoxed(stack);
    Tensors found = stack[0].toTensorVector();
    if (!found.empty() && !(need & kX)) found.insert(found.begin(), Tensor());
    return found;
  }
};

// How many graphs there are whose backward has not run.
struct Pending {
  std::atomic<int64_t> count{0};
};
using Counters = std::array<std::shared_ptr<Pending>, 2>;  // each may be null

// Whether what was looked up is still what would be found: values of dicts, dicts that are empty or have no
// ``forward``, and operands, which stay the same objects when they are moved, cast or given other data. Its owner keeps
// the lists.
struct Guard {
  py::handle places, keys, values, empty, without;
  Borrowed operands;
  std::vector<std::tuple<caffe2::TypeMeta, at::Device, std::vector<int64_t>>> kinds;

  Guard(const py::list& in, const py::list& by, const py::list& what, const py::list& nothing,
        const py::list& attributes, const py::list& tensors)
      : places(in), keys(by), values(what), empty(nothing), without(attributes), operands(tensors) {
    for (size_t i = 0; i < operands.size(); ++i) {
      kinds.emplace_back(operands[i].dtype(), operands[i].device(), operands[i].sizes().vec());
    }
  }

  bool holds() const {
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(places.ptr()); ++i) {
      if (PyDict_GetItem(PyList_GET_ITEM(places.ptr(), i), PyList_GET_ITEM(keys.ptr(), i)) !=
          PyList_GET_ITEM(values.ptr(), i)) {
        return false;
      }
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(empty.ptr()); ++i) {
      if (PyObject_Length(PyList_GET_ITEM(empty.ptr(), i)) != 0) return false;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(without.ptr()); ++i) {
      if (PyDict_Contains(PyList_GET_ITEM(without.ptr(), i), forward) != 0) return false;
    }
    for (size_t i = 0; i < operands.size(); ++i) {
      const auto& [dtype, device, sizes] = kinds[i];
      const Tensor& now = operands[i];
      if (now.dtype() != dtype || now.device() != device || now.sizes() != at::IntArrayRef(sizes)) return false;
    }
    return true;
  }
};

}  // namespace fastlora::node

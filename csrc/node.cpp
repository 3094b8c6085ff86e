// The autograd node of an adapted group: a direction that has a native call takes no Python on its way.
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <array>
#include <atomic>

#include "plan.h"

namespace py = pybind11;

namespace fastlora::node {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a backward is asked for, a bit each.
enum Need : unsigned { kX = 1, kA = 2, kB = 4, kZ = 8, kNeeds = 16 };

const plan::Registry* registry = nullptr;

// The results of a plan, undefined where there is none; nothing without a plan for these.
Tensors run_plan(int64_t cache, int64_t variant, Tensors& inputs) {
  const plan::RunPlan run = registry == nullptr ? nullptr : registry->run.load();
  if (run == nullptr) return {};
  std::vector<AtenTensorHandle> handles, results;
  handles.reserve(inputs.size());
  for (Tensor& input : inputs) handles.push_back(torch::aot_inductor::tensor_pointer_to_tensor_handle(&input));
  Tensors found;
  try {
    if (!run(cache, variant, handles, results)) return {};
  } catch (const std::exception&) {
    return {};  // Python's way meets it again, and says what is the matter
  }
  found.reserve(results.size());
  for (const AtenTensorHandle result : results) {
    if (result == nullptr) {
      found.emplace_back();
      continue;
    }
    found.push_back(std::move(*torch::aot_inductor::tensor_handle_to_tensor_pointer(result)));
    aoti_torch_delete_tensor_object(result);
  }
  return found;
}

// Whether tensors may have tangents.
bool forward_mode() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

// Whether only the dispatcher knows what is in a tensor.
bool wrapped(const Tensor& t) {
  static const c10::DispatchKeySet kept(
      {c10::DispatchKey::Negative, c10::DispatchKey::Conjugate, c10::DispatchKey::ZeroTensor, c10::DispatchKey::Python,
       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched, c10::DispatchKey::Functionalize});
  return !(t.key_set() & kept).empty();
}

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

  Tensors backward(const variable_list& dy, const Tensor& x, const Tensor& h, const Tensors& a, const Tensors& b,
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
// ``forward``, and weights, which stay the same objects when they are moved or cast. Its owner keeps the lists.
struct Guard {
  py::handle places, keys, values, empty, without;
  Borrowed weights;
  std::vector<at::TensorOptions> options;

  Guard(const py::list& in, const py::list& by, const py::list& what, const py::list& nothing,
        const py::list& attributes, const py::list& frozen)
      : places(in), keys(by), values(what), empty(nothing), without(attributes), weights(frozen) {
    for (size_t i = 0; i < weights.size(); ++i) options.push_back(weights[i].options());
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
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i].dtype() != options[i].dtype() || weights[i].device() != options[i].device()) return false;
    }
    return true;
  }
};

// One call of a group: what its backward takes beside saved tensors.
struct Call : torch::CustomClassHolder {
  std::shared_ptr<const Group> group;
  std::shared_ptr<Plans> plans;  // null: by the library's whole call or by Python
  py::object owner, rest;        // what Python's backward is for, where no native call does it
  Tensors out;                   // [*y, h, *moments], until they are saved
  Tensors more;                  // what a plan takes beside the tensors of every call, or the seed of dropout
  std::vector<std::pair<const void*, int64_t>> versions;  // of ``Group::counted``, and which tensors they were
  size_t leaves = 0, moments = 0;
  int64_t probes = 0;
  double p = 0.0;
  bool whole = false;

  Call() = default;
  ~Call() override {
    finish();
    if (Py_IsInitialized() == 0) {  // the process ends, and what is left of Python with it
      owner.release();
      rest.release();
      return;
    }
    const py::gil_scoped_acquire gil;
    owner = rest = py::object();
  }

  void count_in(Counters counters) {
    pending_ = std::move(counters);
    for (const auto& counter : pending_) {
      if (counter) ++counter->count;
    }
  }
  void finish() {
    if (finished_.exchange(true)) return;
    for (const auto& counter : pending_) {
      if (counter) --counter->count;
    }
  }

  static std::pair<const void*, int64_t> version_of(const Tensor& t) { return {t.unsafeGetTensorImpl(), t._version()}; }

  void check_versions() const {
    for (size_t i = 0; i < versions.size(); ++i) {
      TORCH_CHECK(version_of(group->counted[i]) == versions[i],
                  "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                  "place after the forward");
    }
  }

 private:
  Counters pending_;
  std::atomic<bool> finished_{false};
};

variable_list by_python(const Call& call, const std::vector<bool>& needs, const variable_list& dy,
                        const variable_list& saved) {
  const py::gil_scoped_acquire gil;
  try {
    const py::list found = call.owner.attr("differentiated")(call.rest, needs, dy, saved);
    variable_list grads;
    for (const py::handle& grad : found) grads.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
    return grads;
  } catch (py::error_already_set& error) {
    // The engine may pass it to another thread.
    error.restore();
    python_error kept;
    kept.persist();
    throw kept;
  }
}

// [dx, *dA, *dB, *dZ], those that are not needed left out but for dx; nothing where no native call does it.
Tensors natively(const Call& call, const variable_list& dy, const Tensor& x, const Tensor& h, Tensors A, Tensors B,
                 unsigned need) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (call.whole) {
    const auto seed = call.more.empty() ? std::nullopt : std::optional<Tensor>(call.more[0]);
    return call.group->backward(dy, x, h, A, B, call.probes, need, seed, call.p);
  }
  const int64_t variant = call.plans ? call.plans->backward[need].load() : -1;
  if (variant < 0) return {};
  Tensors inputs{x, h};
  call.group->W.append_to(inputs);
  for (const Tensors* part : {&std::as_const(A), &std::as_const(B), &dy, &call.more}) {
    inputs.insert(inputs.end(), part->begin(), part->end());
  }
  return run_plan(call.plans->cache, variant, inputs);
}

struct LoRA : torch::autograd::Function<LoRA> {
  // ``inputs``: x, A, B, Z, V.
  static variable_list forward(AutogradContext* context, const c10::intrusive_ptr<Call>& call, at::TensorList inputs) {
    const auto outputs = static_cast<std::ptrdiff_t>(call->group->W.size());
    Tensors& out = call->out;
    variable_list y(out.begin(), out.begin() + outputs), saved{inputs[0]};
    saved.insert(saved.end(), out.begin() + outputs, out.end());
    saved.insert(saved.end(), inputs.begin() + 1,
                 inputs.begin() + 1 + static_cast<std::ptrdiff_t>(2 * call->group->A.size()));
    out.clear();
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list dy) {
    const auto kept = context->saved_data["call"].toCapsule();
    Call& call = *static_cast<Call*>(kept.get());
    call.finish();
    const size_t factors = call.group->A.size(), count = 1 + 2 * factors + call.leaves + call.moments;
    variable_list result(1 + count);
    if (std::none_of(dy.begin(), dy.end(), [](const Tensor& g) { return g.defined(); })) return result;
    const variable_list saved = context->get_saved_variables();
    call.check_versions();
    std::vector<bool> needs(count);
    for (size_t i = 0; i < count; ++i) needs[i] = context->needs_input_grad(i);
    const auto any = [&](size_t start, size_t size, unsigned bit) {
      const auto first = needs.begin() + static_cast<std::ptrdiff_t>(start);
      return std::find(first, first + static_cast<std::ptrdiff_t>(size), true) ==
                     first + static_cast<std::ptrdiff_t>(size)
                 ? 0u
                 : bit;
    };
    const unsigned need =
        any(0, 1, kX) | any(1, factors, kA) | any(1 + factors, factors, kB) | any(1 + 2 * factors, call.leaves, kZ);
    const auto known = [](const Tensor& t) { return t.defined() && !wrapped(t); };
    const bool plain = !at::GradMode::is_enabled() && !forward_mode() && std::all_of(dy.begin(), dy.end(), known) &&
                       std::all_of(saved.begin(), saved.end(), known);
    const auto part = [&](size_t start, size_t size) {
      const auto first = saved.begin() + static_cast<std::ptrdiff_t>(start);
      return Tensors(first, first + static_cast<std::ptrdiff_t>(size));
    };
    const size_t first = 2 + call.moments;
    Tensors found;
    if (plain)
      found = natively(call, dy, saved[0], saved[1], part(first, factors), part(first + factors, factors), need);
    if (found.empty()) {
      const variable_list grads = by_python(call, needs, dy, saved);
      std::copy(grads.begin(), grads.end(), result.begin() + 1);
      return result;
    }
    size_t next = 0, at = 1;
    result[at++] = found[next++];
    for (const auto& [bit, size] : {std::pair<unsigned, size_t>{kA, factors}, {kB, factors}, {kZ, call.leaves}}) {
      for (size_t i = 0; i < size; ++i, ++at) {
        if (need & bit) result[at] = found[next++];
      }
    }
    std::copy_n(saved.begin() + 2, call.moments, result.begin() + static_cast<std::ptrdiff_t>(at));
    return result;
  }
};

// Whether a mode, a transform, a tracer, autocast or a subclass sees what the dispatcher is called for, or a frozen
// tensor is none any more: Python's way knows what to do.
bool watched(const Group& group, const py::handle& x) {
  if (!THPVariable_CheckExact(x.ptr())) return true;
  const Tensor& given = THPVariable_Unpack(x.ptr());
  return wrapped(given) || given.dtype() != group.W[0].dtype() || c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode) || forward_mode() ||
         at::tracer::impl::is_dispatch_enabled() ||
         (!given.is_meta() && at::autocast::is_autocast_enabled(given.device().type())) || group.trains_base();
}

// ``whole``: 2 where the backward is one call of the library's; ``more``: what a forward takes beside the tensors of
// every call, ``later`` of them in the backward too.
Tensors attach(const std::shared_ptr<const Group>& group, const Tensor& x, const Tensors& Z, const Tensors& V,
               py::object owner, py::object rest, std::shared_ptr<Plans> plans, int64_t whole, int64_t probes, double p,
               const Tensors& more, size_t later, std::shared_ptr<Pending> pending, std::shared_ptr<Pending> also,
               Tensors out) {
  if (!at::GradMode::is_enabled()) {
    out.resize(group->W.size());
    return out;
  }
  auto call = c10::make_intrusive<Call>();
  call->group = group;
  call->plans = std::move(plans);
  call->whole = (whole & 2) != 0;
  call->owner = std::move(owner);
  call->rest = std::move(rest);
  call->leaves = Z.size();
  call->moments = V.size();
  call->probes = probes;
  call->p = p;
  call->more.assign(more.end() - static_cast<std::ptrdiff_t>(later), more.end());
  call->out = std::move(out);
  call->count_in({std::move(pending), std::move(also)});
  for (size_t i = 0; i < group->counted.size(); ++i) {
    call->versions.push_back(Call::version_of(group->counted[i]));
  }
  Tensors inputs{x};
  group->A.append_to(inputs);
  group->B.append_to(inputs);
  for (const Tensors* part : {&Z, &V}) inputs.insert(inputs.end(), part->begin(), part->end());
  const py::gil_scoped_release released;
  return LoRA::apply(call, at::TensorList(inputs));
}

// A call for which there is a native one, by a plan or (``whole`` 1) by the library, with P and the seed of dropout in
// ``more`` where there are such; nothing otherwise.
std::optional<Tensors> run(const std::shared_ptr<const Group>& group, const py::object& given, const Tensors& Z,
                           const Tensors& V, py::object owner, py::object rest, std::shared_ptr<Plans> plans,
                           int64_t whole, int64_t probes, double p, const Tensors& more, size_t later,
                           std::shared_ptr<Pending> pending, std::shared_ptr<Pending> also) {
  if (watched(*group, given)) return std::nullopt;
  const Tensor& x = THPVariable_Unpack(given.ptr());
  Tensors out;
  {
    const py::gil_scoped_release released;
    const at::AutoDispatchBelowADInplaceOrView below;
    if (whole & 1) {
      const auto P = more.size() > later ? std::optional<Tensor>(more[0]) : std::nullopt;
      const auto seed = later > 0 ? std::optional<Tensor>(more.back()) : std::nullopt;
      out = group->forward(x, P, !V.empty(), seed, p);
    } else if (plans && plans->forward >= 0) {
      Tensors inputs{x};
      for (const Borrowed* part : {&group->W, &group->bias, &group->A, &group->B}) part->append_to(inputs);
      inputs.insert(inputs.end(), more.begin(), more.end());
      out = run_plan(plans->cache, plans->forward, inputs);
    }
  }
  if (out.empty()) return std::nullopt;
  return attach(group, x, Z, V, std::move(owner), std::move(rest), std::move(plans), whole, probes, p, more, later,
                std::move(pending), std::move(also), std::move(out));
}

}  // namespace
}  // namespace fastlora::node

PYBIND11_MODULE(_node, m) {
  using namespace fastlora::node;
  m.doc() = "The autograd node of fastlora.ops.bound, without Python where a native call does a direction.";
  m.attr("torch_version") = TORCH_VERSION;
  m.def(
      "open_plans",
      [](int64_t place) {
        const auto* const found = reinterpret_cast<const fastlora::plan::Registry*>(place);
        if (found->format == fastlora::plan::kFormat) registry = found;
      },
      py::arg("registry"), "Take in where fastlora._plan lists plans.");
  py::class_<Plans, std::shared_ptr<Plans>>(m, "Plans", "Numbers of the plans of calls that differ in tensors only.")
      .def(py::init<>())
      .def("keep", &Plans::keep, py::arg("cache"), py::arg("need"), py::arg("variant"));
  py::class_<Group, std::shared_ptr<Group>>(m, "Group", "The tensors of a group that are there before its input is.")
      .def(py::init<const py::sequence&, const py::sequence&, const py::sequence&, const py::sequence&,
                    const py::sequence&, std::vector<int64_t>, std::vector<int64_t>, std::vector<double>,
                    std::vector<int64_t>>(),
           py::arg("W"), py::arg("bias"), py::arg("A"), py::arg("B"), py::arg("counted"), py::arg("outputs"),
           py::arg("columns"), py::arg("scales"), py::arg("streams"));
  py::class_<Guard>(m, "Guard", "Of what was looked up.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::list&,
                    const py::list&>(),
           py::arg("places"), py::arg("keys"), py::arg("values"), py::arg("empty"), py::arg("without_forward"),
           py::arg("weights"))
      .def("holds", &Guard::holds, "Whether all of it is as it was.");
  py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending", "Graphs that are there and whose backward has not run.")
      .def(py::init<>())
      .def_property_readonly("count", [](const Pending& pending) { return pending.count.load(); });
  m.def("run", &run);
  m.def("attach", &attach);
}

// The autograd node of an adapted group: a direction that has a native call takes no Python on its way.
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/version.h>

#include "group.h"
#include "plan.h"
#include "sample.h"

namespace fastlora::node {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

const plan::Registry* registry = nullptr;
const SampleCalls* calls = nullptr;

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

// [dx, *dA, *dB, *dZ, *dV] by Python's backward.
variable_list by_python(const py::object& owner, const py::object& rest, const std::vector<bool>& needs,
                        const variable_list& dy, const variable_list& saved) {
  const py::gil_scoped_acquire gil;
  try {
    const py::list found = owner.attr("differentiated")(rest, needs, dy, saved);
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

// One call of a group in the graph. Edges: to x, A, B, and to Z and V where no factor has a gradient.
struct LoRA : Node {
  std::shared_ptr<const Group> group;
  Tensors counted;  // Z and V without an edge, whose ``.grad`` a backward adds to as AccumulateGrad does: an edge costs
                    // more than what flows through it
  std::shared_ptr<Plans> plans;  // null: by the library's whole call or by Python
  py::object owner, rest;        // what Python's backward is for, where no native call does it
  Tensors more;                  // what a plan takes beside the tensors of every call, or the seed of dropout
  size_t leaves = 0, moments = 0;
  int64_t probes = 0;
  double p = 0.0;
  bool whole = false;

  LoRA() = default;
  ~LoRA() override {
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

  // ``kept``: x, h, moments, A, B.
  void save(const Tensors& kept) {
    saved_.reserve(kept.size());
    for (const Tensor& t : kept) saved_.emplace_back(t, /*is_output=*/false);
    versions_.reserve(group->counted.size());
    for (size_t i = 0; i < group->counted.size(); ++i) {
      versions_.push_back(version_of(group->counted[i]));
    }
  }

  void will_release_variables() override { last_ = true; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    freed_ = true;
  }

  variable_list apply(variable_list&& dy) override {
    finish();
    if (std::none_of(dy.begin(), dy.end(), [](const Tensor& g) { return g.defined(); })) {
      return variable_list(num_outputs());
    }
    Tensors saved = unpacked();
    check_versions();
    const std::vector<bool> needs = needed();
    variable_list result = differentiated(needs, dy, saved);
    if (counted.empty()) return result;
    for (size_t i = 0; i < moments; ++i) saved[2 + i].reset();
    count(needs, {std::make_move_iterator(result.begin() + num_outputs()), std::make_move_iterator(result.end())});
    result.resize(num_outputs());
    return result;
  }

 private:
  std::vector<torch::autograd::SavedVariable> saved_;
  std::vector<std::pair<const void*, int64_t>> versions_;  // of ``Group::counted``, and which tensors they were
  Counters pending_;
  std::atomic<bool> finished_{false};
  bool freed_ = false, last_ = false;

  void finish() {
    if (finished_.exchange(true)) return;
    for (const auto& counter : pending_) {
      if (counter) --counter->count;
    }
  }

  Tensors unpacked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!freed_, torch::autograd::ERR_BACKWARD_TWICE);
    Tensors out;
    out.reserve(saved_.size());
    for (const auto& kept : saved_) out.push_back(kept.unpack(getptr()));
    // What nobody else refers to becomes a gradient without a copy.
    for (size_t i = 0; last_ && i < moments; ++i) saved_[2 + i].reset_data();
    return out;
  }

  // Which gradients are asked for, of x, A, B, Z and V. What is counted without an edge counts as a leaf that was not
  // named does: in every backward to which no inputs were given.
  std::vector<bool> needed() const {
    const auto* const named = torch::autograd::get_current_graph_task_exec_info();
    std::vector<bool> needs(num_outputs() + counted.size());
    for (size_t i = 0; i < num_outputs(); ++i) needs[i] = task_should_compute_output(i);
    for (size_t i = 0; i < counted.size(); ++i) {
      needs[num_outputs() + i] = named != nullptr && named->empty() && counted[i].requires_grad();
    }
    return needs;
  }

  // [dx, *dA, *dB, *dZ, *dV]
  variable_list differentiated(const std::vector<bool>& needs, const variable_list& dy, const Tensors& saved) const {
    const size_t factors = group->A.size();
    const auto any = [&](size_t start, size_t size, unsigned bit) {
      const auto first = needs.begin() + static_cast<std::ptrdiff_t>(start);
      const auto last = first + static_cast<std::ptrdiff_t>(size);
      return std::find(first, last, true) == last ? 0u : bit;
    };
    const unsigned need =
        any(0, 1, kX) | any(1, factors, kA) | any(1 + factors, factors, kB) | any(1 + 2 * factors, leaves, kZ);
    const auto known = [](const Tensor& t) { return t.defined() && !wrapped(t); };
    const bool plain = !at::GradMode::is_enabled() && !forward_mode() && std::all_of(dy.begin(), dy.end(), known) &&
                       std::all_of(saved.begin(), saved.end(), known);
    Tensors found;
    if (plain) found = natively(dy, saved, need);
    if (found.empty()) return by_python(owner, rest, needs, dy, saved);
    variable_list result;
    result.reserve(needs.size());
    auto next = std::make_move_iterator(found.begin());
    result.push_back(*next++);
    for (const auto& [bit, size] : {std::pair<unsigned, size_t>{kA, factors}, {kB, factors}, {kZ, leaves}}) {
      for (size_t i = 0; i < size; ++i) result.push_back(need & bit ? *next++ : Tensor());
    }
    result.insert(result.end(), saved.begin() + 2, saved.begin() + 2 + static_cast<std::ptrdiff_t>(moments));
    return result;
  }

  // Add gradients of ``counted`` to what is there; several threads may have a leaf in common.
  void count(const std::vector<bool>& needs, Tensors grads) const {
    static std::mutex adding;
    const std::lock_guard<std::mutex> lock(adding);
    for (size_t i = 0; i < counted.size(); ++i) {
      if (!grads[i].defined() || !needs[num_outputs() + i]) continue;
      const Tensor& leaf = counted[i];
      TORCH_CHECK(grads[i].sizes() == leaf.sizes() && grads[i].dtype() == leaf.dtype(), "expected a gradient of ",
                  leaf.sizes(), ", got ", grads[i].sizes());
      if (!leaf.grad().defined() && nobody_elses(grads[i]) && leaf.is_contiguous()) {
        leaf.mutable_grad() = std::move(grads[i]);
        continue;
      }
      torch::autograd::AccumulateGrad::accumulateGrad(leaf, leaf.mutable_grad(), grads[i], 1,
                                                      [&](Tensor&& grad) { leaf.mutable_grad() = std::move(grad); });
    }
  }

  // Whether AccumulateGrad would keep a gradient as it is, but for a detached copy of what has nothing to detach from.
  static bool nobody_elses(const Tensor& grad) {
    return grad.use_count() == 1 && !grad.requires_grad() && !grad.is_view() && !at::GradMode::is_enabled() &&
           grad.layout() == at::kStrided && grad.is_contiguous();
  }

  static std::pair<const void*, int64_t> version_of(const Tensor& t) { return {t.unsafeGetTensorImpl(), t._version()}; }

  void check_versions() const {
    for (size_t i = 0; i < versions_.size(); ++i) {
      TORCH_CHECK(version_of(group->counted[i]) == versions_[i],
                  "weight: expected as it was in the forward, since the backward multiplies by it; it was changed in "
                  "place after the forward");
    }
  }

  // [dx, *dA, *dB, *dZ], those that are not needed left out but for dx; nothing where no native call does it.
  Tensors natively(const variable_list& dy, const Tensors& saved, unsigned need) const {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto A = saved.begin() + 2 + static_cast<std::ptrdiff_t>(moments);
    const auto B = A + static_cast<std::ptrdiff_t>(group->A.size());
    if (whole) {
      const auto seed = more.empty() ? std::nullopt : std::optional<Tensor>(more[0]);
      return group->backward(dy, saved[0], saved[1], {A, B}, {B, saved.end()}, probes, need, seed, p);
    }
    const int64_t variant = plans ? plans->backward[need].load() : -1;
    if (variant < 0) return {};
    Tensors inputs{saved[0], saved[1]};
    inputs.reserve(2 + 2 * group->W.size() + group->A.size() + group->B.size() + more.size());
    group->W.append_to(inputs);
    inputs.insert(inputs.end(), A, saved.end());
    for (const Tensors* part : {&dy, &more}) inputs.insert(inputs.end(), part->begin(), part->end());
    return run_plan(plans->cache, variant, inputs);
  }
};

// Torch's releases differ in who counts the references to a node.
using NodePointer = decltype(torch::autograd::Edge::function);
template <class Pointer, class T>
auto new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

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
  Tensors inputs{x}, counted(Z);
  inputs.reserve(1 + 2 * group->A.size() + Z.size() + V.size());
  group->A.append_to(inputs);
  group->B.append_to(inputs);
  counted.insert(counted.end(), V.begin(), V.end());
  const auto factors = inputs.end() - inputs.begin();
  const auto learns = [](const Tensor& t) { return t.requires_grad(); };
  // Else a graph may have no other leaf, or none whose stream the end of a backward waits for. A part of a leaf has an
  // edge to it.
  if (std::none_of(inputs.begin() + 1, inputs.end(), learns) ||
      !std::all_of(counted.begin(), counted.end(), [](const Tensor& t) { return t.is_leaf(); })) {
    inputs.insert(inputs.end(), counted.begin(), counted.end());
    counted.clear();
  }
  Tensors y(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(group->W.size()));
  if (std::none_of(inputs.begin(), inputs.end(), learns)) return y;
  auto node = new_node<NodePointer, LoRA>();
  node->group = group;
  node->counted = std::move(counted);
  node->plans = std::move(plans);
  node->whole = (whole & 2) != 0;
  node->owner = std::move(owner);
  node->rest = std::move(rest);
  node->leaves = Z.size();
  node->moments = V.size();
  node->probes = probes;
  node->p = p;
  node->more.assign(more.end() - static_cast<std::ptrdiff_t>(later), more.end());
  node->count_in({std::move(pending), std::move(also)});
  const py::gil_scoped_release released;
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(y, node);
  Tensors kept{x};
  kept.reserve(out.size() - y.size() + static_cast<size_t>(factors));
  kept.insert(kept.end(), out.begin() + static_cast<std::ptrdiff_t>(y.size()), out.end());
  kept.insert(kept.end(), inputs.begin() + 1, inputs.begin() + factors);
  node->save(kept);
  return y;
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

// The averages of a tracker, of what the backwards of a step add to leaves: Z first and V then.
struct Averages {
  Tensor means, steps, skipped;
  Borrowed leaves;  // whose owner is that of the averages
  size_t matrices;  // leaves that are Z
  std::vector<int64_t> runs, sizes;
  bool squares_first;

  // Takes in the leaves' gradients, which are theirs no more. False, and nothing has changed, where one has none that
  // is plain memory.
  bool fold(double factor, std::optional<double> weight, int64_t n) const {
    Sample sample{{}, {}, runs, sizes, factor, weight.value_or(-1.0), n};
    sample.Q.reserve(matrices);
    for (size_t i = 0; i < leaves.size(); ++i) {
      const Tensor& grad = leaves[i].grad();
      if (!grad.defined() || grad.layout() != at::kStrided || !grad.is_contiguous()) return false;
      const bool wide = grad.scalar_type() == at::kDouble;
      if (grad.scalar_type() != leaves[i].scalar_type() || grad.sizes() != leaves[i].sizes()) return false;
      (i < matrices ? sample.Q : sample.V).push_back({grad.const_data_ptr(), grad.numel(), wide});
    }
    calls->fold(sample, {means.mutable_data_ptr<double>(), steps.mutable_data_ptr<double>(),
                         skipped.mutable_data_ptr<int64_t>(), means.size(1), squares_first});
    for (size_t i = 0; i < leaves.size(); ++i) leaves[i].mutable_grad().reset();
    return true;
  }
};

Averages averages(Tensor means, Tensor steps, Tensor skipped, const py::sequence& leaves, size_t matrices,
                  std::vector<int64_t> runs, std::vector<int64_t> sizes, bool squares_first) {
  Borrowed grown(leaves);
  size_t first = 0;
  const auto fits = [&](const Tensor& V, int64_t count) {
    int64_t columns = 1;
    for (int64_t run = 0; run < count && first < sizes.size(); ++run) columns += sizes[first++];
    return V.scalar_type() == at::kDouble && V.numel() == 2 * columns;
  };
  const auto all = [&](size_t count) { return static_cast<int64_t>(count) == means.size(1); };
  bool right = calls != nullptr && matrices + runs.size() == grown.size() && means.sizes() == steps.sizes() &&
               means.size(0) == (matrices > 0) + !runs.empty() && (matrices == 0 || all(matrices)) &&
               (runs.empty() || all(sizes.size()));
  for (size_t i = 0; right && i < runs.size(); ++i) right = fits(grown[matrices + i], runs[i]);
  if (!right || first != sizes.size()) throw py::value_error("expected leaves as runs and sizes say");
  return {std::move(means), std::move(steps), std::move(skipped), std::move(grown),
          matrices,         std::move(runs),  std::move(sizes),   squares_first};
}

// The operator philox_signs_ on a CPU.
void write_signs(int64_t first, int64_t tag, const std::vector<int64_t>& counts, const Tensor& out, const Tensor& seed,
                 int64_t step) {
  calls->signs(out.mutable_data_ptr<float>(), static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), step, first, tag,
               counts);
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
           py::arg("operands"))
      .def("holds", &Guard::holds, "Whether all of it is as it was.");
  py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending", "Graphs that are there and whose backward has not run.")
      .def(py::init<>())
      .def_property_readonly("count", [](const Pending& pending) { return pending.count.load(); });
  m.def(
      "open_samples",
      [](int64_t place) {
        const auto* const found = reinterpret_cast<const fastlora::SampleCalls*>(place);
        if (found->format == fastlora::SampleCalls::kFormat) calls = found;
        return calls != nullptr;
      },
      py::arg("calls"), "Take in what the native library does at every step of a tracker.");
  py::class_<Averages>(m, "Averages", "Averages of what the backwards of a step add to leaves.")
      .def(py::init(&averages), py::arg("means"), py::arg("steps"), py::arg("skipped"), py::arg("leaves"),
           py::arg("matrices"), py::arg("runs"), py::arg("sizes"), py::arg("squares_first"))
      .def("fold", &Averages::fold, py::arg("factor"), py::arg("weight"), py::arg("n"));
  m.def("write_signs", &write_signs);
  m.def("run", &run);
  m.def("attach", &attach);
}

// Elementwise operators and reductions by name: a real device's checks, promotion, shapes and one output, no kernel.
#include <ATen/EmptyTensor.h>
#include <ATen/ScalarOps.h>
#include <ATen/TensorIterator.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "null_gpu.h"

namespace {

using at::Tensor;
using torch::jit::Stack;

enum class Result { kPromoted, kFloat, kBool };

void kernel(const c10::OperatorHandle& op, const Tensor& out) {
  if (out.numel() > 0) null_gpu_note(kKernel, op.operator_name().name.c_str(), nullptr, 0);
}

Tensor wrapped(const at::Scalar& number) {
  Tensor tensor = c10::scalar_to_tensor(number);
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

// Every tensor among the arguments is an input, and the first Scalar (as much as an iterator takes on a device); a
// tensor that is written to is the output.
template <Result result>
void pointwise(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  Tensor out;
  c10::SmallVector<Tensor, 4> inputs;
  bool scalar = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) inputs.push_back(value.toTensor());
    if (value.isScalar() && arguments[i].type()->kind() != c10::TypeKind::BoolType && !scalar) {
      inputs.push_back(wrapped(value.toScalar()));
      scalar = true;
    }
    const auto* alias = arguments[i].alias_info();
    if (alias != nullptr && alias->isWrite()) out = value.toTensor();
  }
  at::TensorIteratorConfig config;
  config.add_output(out).allow_cpu_scalars(true).promote_inputs_to_common_dtype(true);
  if (result == Result::kFloat) config.promote_integer_inputs_to_float(true);
  if (result == Result::kBool && !out.defined()) config.declare_static_dtype(at::kBool);
  for (const Tensor& input : inputs) config.add_const_input(input);
  const Tensor made = config.build().output();
  kernel(op, made);
  stack->resize(first);
  stack->push_back(made);
}

const c10::IValue* named(const c10::OperatorHandle& op, const Stack& stack, const char* name) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == name) return &stack[stack.size() - arguments.size() + i];
  }
  return nullptr;
}

at::ScalarType reduced_dtype(const c10::OperatorHandle& op, const Stack& stack, const Tensor& self, Result result) {
  const c10::IValue* dtype = named(op, stack, "dtype");
  if (dtype != nullptr && !dtype->isNone()) return dtype->toScalarType();
  return result == Result::kBool ? at::kBool : self.scalar_type();
}

// Over the dimensions that an argument `dim` names, all without it.
template <Result result>
void reduction(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const Tensor self = stack->at(stack->size() - op.schema().arguments().size()).toTensor();
  const c10::IValue *dim = named(op, *stack, "dim"), *keep = named(op, *stack, "keepdim");
  std::vector<bool> gone(self.dim(), true);
  if (dim != nullptr && dim->isInt()) {
    gone.assign(self.dim(), false);
    gone[at::maybe_wrap_dim(dim->toInt(), self.dim())] = true;
  } else if (dim != nullptr && dim->isIntList() && !dim->toIntList().empty()) {
    gone.assign(self.dim(), false);
    for (const int64_t i : dim->toIntVector()) gone[at::maybe_wrap_dim(i, self.dim())] = true;
  }
  at::DimVector size;
  for (int64_t i = 0; i < self.dim(); ++i) {
    if (!gone[i]) size.push_back(self.size(i));
    if (gone[i] && keep != nullptr && keep->toBool()) size.push_back(1);
  }
  const Tensor out = at::empty(size, self.options().dtype(reduced_dtype(op, *stack, self, result)));
  kernel(op, out);
  stack->resize(stack->size() - op.schema().arguments().size());
  stack->push_back(out);
}

// One launch for a list of tensors, in place or into as many outputs.
void foreach (const c10::OperatorHandle& op, c10::DispatchKeySet, Stack * stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  const auto given = (*stack)[first].toTensorVector();
  const bool in_place = arguments[0].alias_info() != nullptr && arguments[0].alias_info()->isWrite();
  kernel(op, given[0]);
  stack->resize(first);
  if (in_place) return;
  c10::List<Tensor> made;
  for (const Tensor& tensor : given) made.push_back(at::empty_like(tensor));
  stack->push_back(made);
}

// One launch for all norms, and a view of its result for each.
void foreach_norm(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  const auto given = (*stack)[first].toTensorVector();
  const auto options = given[0].options();
  const Tensor parts = at::empty({static_cast<int64_t>(given.size()), 64}, options);
  const Tensor norms = at::empty({static_cast<int64_t>(given.size())},
                                 options.dtype(reduced_dtype(op, *stack, given[0], Result::kPromoted)));
  kernel(op, parts);
  kernel(op, norms);
  stack->resize(first);
  c10::List<Tensor> views;
  for (int64_t i = 0; i < norms.size(0); ++i) views.push_back(at::cpu::as_strided(norms, {}, {}, i));
  stack->push_back(views);
}

template <Result result>
torch::CppFunction as_pointwise() {
  return torch::CppFunction::makeFromBoxedFunction<&pointwise<result>>();
}

template <Result result>
torch::CppFunction as_reduction() {
  return torch::CppFunction::makeFromBoxedFunction<&reduction<result>>();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (const char* name : {"abs",
                           "abs_",
                           "neg",
                           "neg_",
                           "maximum",
                           "minimum",
                           "clamp",
                           "clamp_",
                           "clamp.Tensor",
                           "clamp_min",
                           "clamp_min_",
                           "clamp_max",
                           "clamp_max_",
                           "pow.Tensor_Scalar",
                           "pow_.Scalar",
                           "where.self",
                           "lerp.Tensor",
                           "lerp.Scalar",
                           "lerp_.Tensor",
                           "lerp_.Scalar",
                           "addcmul",
                           "addcmul_",
                           "addcdiv",
                           "addcdiv_",
                           "bitwise_not",
                           "bitwise_and.Tensor",
                           "bitwise_and_.Tensor",
                           "bitwise_or.Tensor",
                           "bitwise_or_.Tensor",
                           "masked_fill_.Scalar",
                           "masked_fill_.Tensor",
                           "relu",
                           "relu_",
                           "sign"}) {
    m.impl(name, as_pointwise<Result::kPromoted>());
  }
  for (const char* name : {"sqrt", "sqrt_", "rsqrt", "rsqrt_", "reciprocal", "reciprocal_", "exp", "log"}) {
    m.impl(name, as_pointwise<Result::kFloat>());
  }
  for (const char* name :
       {"lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar", "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar",
        "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "logical_not", "logical_and", "logical_or"}) {
    m.impl(name, as_pointwise<Result::kBool>());
  }
  for (const char* name : {"amax", "amin", "mean", "mean.dim", "linalg_vector_norm"}) {
    m.impl(name, as_reduction<Result::kPromoted>());
  }
  for (const char* name : {"_foreach_add_.List", "_foreach_add_.Scalar", "_foreach_mul_.List", "_foreach_mul_.Scalar",
                           "_foreach_mul.List", "_foreach_mul.Scalar", "_foreach_mul.ScalarList", "_foreach_sub.List",
                           "_foreach_div.List", "_foreach_div.Scalar", "_foreach_div.Tensor", "_foreach_zero_",
                           "_foreach_copy_", "_foreach_lerp_.Scalar", "_foreach_lerp_.List"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&foreach>());
  }
  m.impl("_foreach_norm.Scalar", torch::CppFunction::makeFromBoxedFunction<&foreach_norm>());
  for (const char* name : {"any", "any.dim", "all", "all.dim"}) m.impl(name, as_reduction<Result::kBool>());
}

}  // namespace

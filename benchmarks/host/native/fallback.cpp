// Any other operator: torch works out the shapes without data, and outputs are allocated here. Slow, and counted.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include "null_gpu.h"

namespace {

using at::Tensor;

// The shapes that stand for this device's tensors during one call.
struct Standins {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // shape, tensor

  Tensor of(const Tensor& given) {
    if (!given.defined() || !given.is_privateuseone()) return given;
    for (const auto& [shape, tensor] : pairs) {
      if (tensor.is_same(given)) return shape;
    }
    const auto options = given.options().device(at::kMeta);
    Tensor shape = at::empty_strided(given.sizes(), given.strides(), options);
    if (given.storage_offset() != 0) {
      const auto length = given.storage_offset() + at::detail::computeStorageNbytes(given.sizes(), given.strides(), 1);
      shape = at::empty_strided({static_cast<int64_t>(length)}, {1}, options)
                  .as_strided(given.sizes(), given.strides(), given.storage_offset());
    }
    pairs.emplace_back(shape, given);
    return shape;
  }

  Tensor back(const Tensor& shape) const {
    if (!shape.defined() || !shape.is_meta()) return shape;
    for (const auto& [own, tensor] : pairs) {
      if (own.is_same(shape)) {
        if (tensor.sizes() != shape.sizes()) tensor.resize_(shape.sizes());
        return tensor;
      }
    }
    for (const auto& [own, tensor] : pairs) {
      if (own.storage().unsafeGetStorageImpl() == shape.storage().unsafeGetStorageImpl()) {
        return at::cpu::as_strided(tensor, shape.sizes(), shape.strides(), shape.storage_offset());
      }
    }
    return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(at::kPrivateUse1));
  }
};

template <class Map>
c10::IValue mapped(const c10::IValue& value, Map map) {
  if (value.isTensor()) return map(value.toTensor());
  if (value.isDevice() && value.toDevice().is_privateuseone()) return c10::Device(at::kMeta);
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(map(tensor));
    return list;
  }
  if (value.isList() && value.toListRef().size() && !value.isIntList() && !value.isDoubleList() &&
      !value.isBoolList()) {
    c10::impl::GenericList list(value.toList().elementType());
    for (const c10::IValue& item : value.toListRef()) list.push_back(mapped(item, map));
    return list;
  }
  return value;
}

void shapes_only(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  null_gpu_note(kFallback, op.operator_name().name.c_str(), nullptr, 0);
  const auto& schema = op.schema();
  Standins standins;
  const size_t first = stack->size() - schema.arguments().size();
  for (size_t i = first; i < stack->size(); ++i) {
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& tensor) { return standins.of(tensor); });
  }
  op.callBoxedForDispatchKey(c10::DispatchKey::Meta, *stack);
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& tensor) { return standins.back(tensor); });
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&shapes_only>()); }

}  // namespace

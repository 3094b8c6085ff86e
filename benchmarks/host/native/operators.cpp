// The operators that adapted layers meet, with the checks, shapes and allocations of a real device and no kernel.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/InferSize.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorUtils.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/WrapDimUtilsMulti.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_dropout.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "null_gpu.h"

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::Tensor;
using at::TensorIterator;
using std::optional;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void kernel(const char* name, const at::TensorBase& out) {
  if (out.numel() > 0) null_gpu_note(kKernel, name, nullptr, 0);
}

void gemm(const char* name) { null_gpu_note(kGemm, name, nullptr, 0); }

Tensor made(IntArrayRef size, at::ScalarType dtype) {
  return at::detail::empty_generic(size, c10::GetAllocator(c10::DeviceType::PrivateUse1), kKeys, dtype, std::nullopt);
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device> device,
             optional<bool>, optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, c10::GetAllocator(c10::DeviceType::PrivateUse1), kKeys,
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device> device, optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(c10::DeviceType::PrivateUse1), kKeys,
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}

Tensor view(const Tensor& self, at::SymIntArrayRef symbolic) {
  const auto size = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(symbolic), self.numel());
  const auto stride = at::detail::computeStride(self.sizes(), self.strides(), size);
  TORCH_CHECK(stride.has_value(), "view: size ", size, " does not fit strides ", self.strides());
  return at::cpu::as_strided(self, size, *stride, self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::as_strided(self, size, stride, self.storage_offset());
}

const Tensor& resize_(const Tensor& self, at::SymIntArrayRef symbolic, optional<at::MemoryFormat>) {
  const auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  auto* impl = self.unsafeGetTensorImpl();
  const auto bytes = static_cast<int64_t>(c10::multiply_integers(size) * self.element_size());
  if (static_cast<int64_t>(self.storage().nbytes()) < bytes) {
    auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

// Copies. What leaves or reaches the host is an event of its own.
Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (to.numel() == 0) return to;
  const uint64_t bytes = to.nbytes();
  const NullGpuField field = NullGpuField::of(bytes);
  if (self.is_cpu()) {
    null_gpu_note(kToDevice, "copy", &field, 1);
  } else if (to.is_cpu()) {
    null_gpu_note(kToHost, "copy", &field, 1);
    const Tensor flat = to.is_contiguous() ? to : at::empty(to.sizes(), to.options());
    std::memset(flat.data_ptr(), 0, flat.nbytes());
    if (!flat.is_same(to)) to.copy_(flat);
  } else {
    auto iterator = at::TensorIteratorConfig()
                        .add_output(to)
                        .add_const_input(self)
                        .resize_outputs(false)
                        .check_all_same_dtype(false)
                        .check_all_same_device(false)
                        .build();
    kernel("copy", to);
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  at::native::resize_output(to, self.sizes());
  return copy_from(self, to, false);
}

Scalar local_scalar_dense(const Tensor& self) {
  null_gpu_note(kToHost, "item", nullptr, 0);
  return self.scalar_type() == at::kBool             ? Scalar(false)
         : isIntegralType(self.scalar_type(), false) ? Scalar(0)
                                                     : Scalar(0.0);
}

// Products.
Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>&, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef, int64_t) {
  TORCH_CHECK(!transposed, "the null GPU has no transposed convolution");
  gemm("convolution");
  return made(at::native::conv_output_size(x.sizes(), weight.sizes(), padding, stride, dilation), x.scalar_type());
}

Tensor mm(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "mm: ", a.sizes(), " by ", b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "mm: ", a.scalar_type(), " by ", b.scalar_type());
  Tensor out = made({a.size(0), b.size(1)}, a.scalar_type());
  gemm("mm");
  return out;
}

Tensor& mm_out(const Tensor& a, const Tensor& b, Tensor& out) {
  at::native::resize_output(out, {a.size(0), b.size(1)});
  gemm("mm");
  return out;
}

Tensor addmm(const Tensor& bias, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "addmm: ", a.sizes(), " by ", b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && bias.scalar_type() == a.scalar_type(), "addmm: dtypes ",
              bias.scalar_type(), ", ", a.scalar_type(), ", ", b.scalar_type());
  Tensor out = made({a.size(0), b.size(1)}, a.scalar_type());
  gemm("addmm");
  return out;
}

Tensor& addmm_(Tensor& out, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && out.scalar_type() == a.scalar_type(), "addmm_: dtypes differ");
  gemm("addmm_");
  return out;
}

Tensor& addmm_out(const Tensor&, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&, Tensor& out) {
  at::native::resize_output(out, {a.size(0), b.size(1)});
  gemm("addmm");
  return out;
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "bmm: ", a.scalar_type(), " by ", b.scalar_type());
  Tensor out = made({a.size(0), a.size(1), b.size(2)}, a.scalar_type());
  gemm("bmm");
  return out;
}

// Elementwise.
Tensor binary(const char* name, const Tensor& a, const Tensor& b) {
  Tensor out;
  auto iterator = TensorIterator::borrowing_binary_op(out, a, b);
  kernel(name, iterator.output());
  return iterator.output();
}

Tensor& binary_(const char* name, Tensor& a, const Tensor& b) {
  auto iterator = TensorIterator::borrowing_binary_op(a, a, b);
  kernel(name, a);
  return a;
}

Tensor add(const Tensor& a, const Tensor& b, const Scalar&) { return binary("add", a, b); }
Tensor& add_(Tensor& a, const Tensor& b, const Scalar&) { return binary_("add_", a, b); }
Tensor sub(const Tensor& a, const Tensor& b, const Scalar&) { return binary("sub", a, b); }
Tensor& sub_(Tensor& a, const Tensor& b, const Scalar&) { return binary_("sub_", a, b); }
Tensor mul(const Tensor& a, const Tensor& b) { return binary("mul", a, b); }
Tensor& mul_(Tensor& a, const Tensor& b) { return binary_("mul_", a, b); }
Tensor& div_(Tensor& a, const Tensor& b) { return binary_("div_", a, b); }

Tensor div(const Tensor& a, const Tensor& b) {
  Tensor out;
  auto iterator = at::TensorIteratorConfig()
                      .add_output(out)
                      .add_const_input(a)
                      .add_const_input(b)
                      .allow_cpu_scalars(true)
                      .promote_inputs_to_common_dtype(true)
                      .promote_integer_inputs_to_float(true)
                      .enforce_safe_casting_to_output(true)
                      .build();
  kernel("div", iterator.output());
  return iterator.output();
}

Tensor& fill_(Tensor& self, const Scalar&) {
  auto iterator = TensorIterator::borrowing_nullary_op(self);
  kernel("fill_", self);
  return self;
}

Tensor& zero_(Tensor& self) {
  auto iterator = TensorIterator::borrowing_nullary_op(self);
  kernel("zero_", self);
  return self;
}

Tensor& normal_(Tensor& self, double, double, optional<at::Generator>) {
  kernel("normal_", self);
  return self;
}

Tensor& uniform_(Tensor& self, double, double, optional<at::Generator>) {
  kernel("uniform_", self);
  return self;
}

Tensor& random_from_to(Tensor& self, int64_t, optional<int64_t>, optional<at::Generator>) {
  kernel("random_", self);
  return self;
}

Tensor& random_to(Tensor& self, int64_t, optional<at::Generator>) {
  kernel("random_", self);
  return self;
}

Tensor& random_(Tensor& self, optional<at::Generator>) {
  kernel("random_", self);
  return self;
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& self, double, optional<bool>) {
  Tensor out = made(self.sizes(), self.scalar_type()), mask = made(self.sizes(), at::kBool);
  kernel("native_dropout", out);
  return {out, mask};
}

Tensor native_dropout_backward(const Tensor& grad, const Tensor&, double) {
  Tensor out = made(grad.sizes(), grad.scalar_type());
  kernel("native_dropout_backward", out);
  return out;
}

// As on a GPU: one kernel with a mask.
Tensor dropout(const Tensor& self, double p, bool train) {
  if (!train || p <= 0 || self.numel() == 0) return self;
  return std::get<0>(at::native_dropout(self, p, train));
}

Tensor sum(const Tensor& self, at::OptionalIntArrayRef dims, bool keep, optional<at::ScalarType> dtype) {
  const bool every = !dims.has_value() || dims->empty();
  const auto reduced = at::dim_list_to_bitset(every ? at::OptionalIntArrayRef() : dims, self.dim());
  at::DimVector size;
  for (int64_t i = 0; i < self.dim(); ++i) {
    const bool gone = every || reduced[i];
    if (!gone) size.push_back(self.size(i));
    if (gone && keep) size.push_back(1);
  }
  const auto type = isIntegralType(self.scalar_type(), true) ? at::kLong : self.scalar_type();
  Tensor out = made(size, dtype.value_or(type));
  kernel("sum", out);
  return out;
}

Tensor cat(const at::ITensorListRef& given, int64_t dim) {
  const auto tensors = given.materialize();
  const Tensor& first = tensors.front();
  dim = at::maybe_wrap_dim(dim, first.dim());
  auto size = first.sizes().vec();
  size[dim] = 0;
  for (const Tensor& tensor : tensors) size[dim] += tensor.size(dim);
  Tensor out = made(size, at::native::result_type(given));
  kernel("cat", out);
  return out;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("convolution_overrideable", &convolution);
  m.impl("mm", &mm);
  m.impl("mm.out", &mm_out);
  m.impl("addmm", &addmm);
  m.impl("addmm_", &addmm_);
  m.impl("addmm.out", &addmm_out);
  m.impl("bmm", &bmm);
  m.impl("add.Tensor", &add);
  m.impl("add_.Tensor", &add_);
  m.impl("sub.Tensor", &sub);
  m.impl("sub_.Tensor", &sub_);
  m.impl("mul.Tensor", &mul);
  m.impl("mul_.Tensor", &mul_);
  m.impl("div.Tensor", &div);
  m.impl("div_.Tensor", &div_);
  m.impl("fill_.Scalar", &fill_);
  m.impl("zero_", &zero_);
  m.impl("normal_", &normal_);
  m.impl("uniform_", &uniform_);
  m.impl("random_.from", &random_from_to);
  m.impl("random_.to", &random_to);
  m.impl("random_", &random_);
  m.impl("native_dropout", &native_dropout);
  m.impl("native_dropout_backward", &native_dropout_backward);
  m.impl("sum.dim_IntList", &sum);
  m.impl("cat", &cat);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("dropout", &dropout); }

// What autocast does to products on a GPU.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
}

}  // namespace

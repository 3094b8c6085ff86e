// out = x * keep / (1 - p), with a mask that is a function of (seed, projection, row, column)
#include <cmath>

#include "cpu/common.h"

namespace fastlora {
namespace {

template <class T>
void run(const Matrix& x, T* out, const DropoutRow& mask) {
  const Parts parts(x.rows, x.columns * 8);
  parts.run([&](int64_t, int64_t begin, int64_t end) {
    DropoutRow row = mask;
    for (row.row = begin; row.row < end; ++row.row) {
      kernels().of<T>().dropout(x.data<T>() + row.row * x.stride, out + row.row * x.columns, x.columns, row);
    }
  });
}

Tensor dropout(const Tensor& x_, const Tensor& seed, int64_t projection, double p) {
  const Matrix x = read_matrix(x_, "x");
  STD_TORCH_CHECK(seed.dim() == 0 && seed.scalar_type() == ScalarType::Long, "seed has ", seed.dim(),
                  " dimensions and dtype ", seed.scalar_type(), "; a Long tensor with 0 dimensions is needed");
  STD_TORCH_CHECK(projection >= 0 && projection <= 0xffffffffll, "projection is ", projection,
                  "; accepted: 0 to 2^32 - 1");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p is ", p, "; accepted: 0 <= p < 1");
  Tensor result = new_tensor({x.rows, x.columns}, x.dtype);
  if (x.rows == 0 || x.columns == 0) return result;
  DropoutRow mask{};
  mask.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  mask.projection = static_cast<uint32_t>(projection);
  mask.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  mask.scale = static_cast<float>(1.0 / (1.0 - p));
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    run<T>(x, static_cast<T*>(result.mutable_data_ptr()), mask);
  });
  return result;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("dropout", TORCH_BOX(&fastlora::dropout)); }

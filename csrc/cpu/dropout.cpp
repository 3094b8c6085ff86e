// out = x * keep / (1 - p), with a mask that is a function of (seed, projection, row, column), where each row may have
// a seed and a number of its own
#include <cmath>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fastlora {
namespace {

// keys: the (seed, number) of every row, or none where rows have the mask's seed and their own places.
template <class T>
void run(const Matrix& x, T* out, const DropoutRow& mask, const int64_t* keys) {
  const Parts parts(x.rows, x.columns * 8);
  parts.run([&](int64_t, int64_t begin, int64_t end) {
    DropoutRow row = mask;
    for (int64_t m = begin; m < end; ++m) {
      row.row = keys ? keys[2 * m + 1] : m;
      if (keys) row.seed = static_cast<uint64_t>(keys[2 * m]);
      kernels().of<T>().dropout(x.row<T>(m), out + m * x.columns, x.columns, row);
    }
  });
}

DropoutRow read_mask(int64_t projection, double p) {
  STD_TORCH_CHECK(projection >= 0 && projection <= 0xffffffffll, "projection is ", projection,
                  "; accepted: 0 to 2^32 - 1");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p is ", p, "; accepted: 0 <= p < 1");
  DropoutRow mask{};
  mask.projection = static_cast<uint32_t>(projection);
  mask.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  mask.scale = static_cast<float>(1.0 / (1.0 - p));
  return mask;
}

Tensor dropped(const Matrix& x, const DropoutRow& mask, const int64_t* keys) {
  Tensor result = new_tensor({x.rows, x.columns}, x.dtype);
  if (x.rows == 0 || x.columns == 0) return result;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    run<T>(x, static_cast<T*>(result.mutable_data_ptr()), mask, keys);
  });
  return result;
}

Tensor dropout(const Tensor& x_, const Tensor& seed, int64_t projection, double p) {
  const Matrix x = read_matrix(x_, "x");
  DropoutRow mask = read_mask(projection, p);
  mask.seed = read_seed(seed);
  return dropped(x, mask, nullptr);
}

Tensor dropout_rows(const Tensor& x_, const Tensor& keys_, int64_t projection, double p) {
  const Matrix x = read_matrix(x_, "x");
  STD_TORCH_CHECK(keys_.dim() == 2 && keys_.scalar_type() == ScalarType::Long, "keys has ", keys_.dim(),
                  " dimensions and dtype ", keys_.scalar_type(), "; a Long tensor with 2 dimensions is needed");
  STD_TORCH_CHECK(keys_.size(0) == x.rows && keys_.size(1) == 2, "keys is ", keys_.size(0), " x ", keys_.size(1),
                  "; a seed and a number are needed for each of the ", x.rows, " rows of x");
  const Tensor keys = torch::stable::contiguous(keys_);
  return dropped(x, read_mask(projection, p), static_cast<const int64_t*>(keys.const_data_ptr()));
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dropout", TORCH_BOX(&fastlora::dropout));
  m.impl("dropout_rows", TORCH_BOX(&fastlora::dropout_rows));
}

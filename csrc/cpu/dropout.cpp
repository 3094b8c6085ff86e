// out = x * keep / (1 - p), with a mask that is a function of (seed, projection, row, column), where each row may have
// a seed and a number of its own
#include "cpu/masks.h"
#include "cpu/parallel.h"

namespace fastlora {
namespace {

// keys: the (seed, number) of every row, or none where rows have the mask's seed and their own places.
template <class T>
void run(const Matrix& x, T* out, const DropoutRow& mask, const int64_t* keys) {
  const Parts parts(x.rows, x.columns * 8);
  const int64_t words = (x.columns + 31) / 32, block = keys ? 1 : 16;
  parts.run([&](int64_t, int64_t begin, int64_t end) {
    const Scratch<uint32_t> bits(block * words);
    DropoutRow row = mask;
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      row.row = keys ? keys[2 * m + 1] : m;
      if (keys) row.seed = static_cast<uint64_t>(keys[2 * m]);
      kernels().keep_bits(x.columns, row, rows, bits.get());
      for (int64_t i = 0; i < rows; ++i) {
        kernels().of<T>().dropout(x.row<T>(m + i), bits.get() + i * words, row.scale, out + (m + i) * x.columns,
                                  x.columns);
      }
    }
  });
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

// y[:, columns_i] += scale_i h[:, ranks_i] B_i^T, in place
#include "cpu/common.h"
#include "cpu/pack.h"

namespace fastlora {
namespace {

// One projection: its factor, scaled and packed [rank, columns], and where it acts.
struct Projection {
  int64_t rank, columns, offset, column;
  int64_t packed;
};

struct Expansion {
  std::vector<Projection> projections;
  Scratch<float> packed{0};
};

void check_lists(size_t factors, size_t offsets, size_t columns, size_t scales) {
  STD_TORCH_CHECK(offsets == factors, "offsets has ", offsets, " entries, but factors has ", factors);
  STD_TORCH_CHECK(columns == factors, "columns has ", columns, " entries, but factors has ", factors);
  STD_TORCH_CHECK(scales == factors, "scales has ", scales, " entries, but factors has ", factors);
}

void check_operand(ScalarType dtype, const char* name, ScalarType of_y) {
  check_dtype(dtype, name);
  STD_TORCH_CHECK(dtype == of_y || dtype == ScalarType::Float, name, " has dtype ", dtype, ", but y has ", of_y,
                  "; accepted: the dtype of y, or Float");
}

Projection check_projection(const Tensor& factor, int64_t offset, int64_t column, const Tensor& y, int64_t total_rank) {
  check_matrix(factor, "factors");
  check_operand(factor.scalar_type(), "factors", y.scalar_type());
  const Projection it{factor.size(0), factor.size(1), offset, column, 0};
  STD_TORCH_CHECK(offset >= 0 && offset + it.rank <= total_rank, "offsets: columns ", offset, " to ", offset + it.rank,
                  " of h were asked for, but it has ", total_rank);
  STD_TORCH_CHECK(column >= 0 && column + it.columns <= y.size(1), "columns: ", column, " to ", column + it.columns,
                  " of y were asked for, but it has ", y.size(1));
  return it;
}

Expansion prepare(const Tensor& y, int64_t total_rank, const std::vector<Tensor>& factors,
                  const std::vector<int64_t>& offsets, const std::vector<int64_t>& columns,
                  const std::vector<double>& scales) {
  check_lists(factors.size(), offsets.size(), columns.size(), scales.size());
  Expansion out;
  int64_t size = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    Projection it = check_projection(factors[i], offsets[i], columns[i], y, total_rank);
    it.packed = size;
    size += it.rank * it.columns;
    out.projections.push_back(it);
  }
  out.packed = Scratch<float>(size);
  for (size_t i = 0; i < factors.size(); ++i) {
    const Projection& it = out.projections[i];
    pack(factors[i], static_cast<float>(scales[i]), factors[i].scalar_type(), out.packed.get() + it.packed);
  }
  return out;
}

template <class T, class H>
void run(T* y, int64_t ldy, int64_t columns, const Matrix& h, const Expansion& expansion, double* sums, int64_t count) {
  const Parts parts(h.rows, columns * 8);
  const int64_t block = block_rows(columns);
  const TypedKernels<T>& typed = kernels().of<T>();
  const Scratch<double> partial(sums ? parts.count * 2 * count : 0);
  if (sums) std::fill_n(partial.get(), parts.count * 2 * count, 0.0);
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    const Scratch<float> wide(std::is_same_v<H, float> ? 0 : block * h.columns);
    for (int64_t m = begin; m < end; m += block) {
      const int64_t rows = std::min(block, end - m);
      const float* s = rows_as_float(h.data<H>() + m * h.stride, h.stride, rows, h.columns, wide.get());
      const int64_t lds = float_stride<H>(h.stride, h.columns);
      for (const Projection& it : expansion.projections) {
        if (it.rank == 0) continue;
        typed.expand(s + it.offset, lds, rows, expansion.packed.get() + it.packed, it.columns, it.rank, it.columns,
                     y + m * ldy + it.column, ldy);
      }
      if (sums) {
        double* mine = partial.get() + part * 2 * count;
        typed.moments(y + m * ldy, ldy, rows, count, mine, mine + count);
      }
    }
  });
  for (int64_t part = 0; sums && part < parts.count; ++part) {
    for (int64_t i = 0; i < 2 * count; ++i) sums[i] += partial.get()[part * 2 * count + i];
  }
}

Tensor expand_(Tensor y, const Tensor& h_, const std::vector<Tensor>& factors, const std::vector<int64_t>& offsets,
               const std::vector<int64_t>& columns, const std::vector<double>& scales, bool moments) {
  check_matrix(y, "y");
  const ScalarType dtype = y.scalar_type();
  check_dtype(dtype, "y");
  STD_TORCH_CHECK(y.size(1) <= 1 || y.stride(1) == 1, "y has column stride ", y.stride(1), "; 1 is needed");
  check_operand(h_.scalar_type(), "h", dtype);
  const Matrix h = read_matrix(h_, "h");
  STD_TORCH_CHECK(h.rows == y.size(0), "h has ", h.rows, " rows, but y has ", y.size(0));
  const Expansion expansion = prepare(y, h.columns, factors, offsets, columns, scales);
  const int64_t width = y.size(1);
  Tensor result = moments ? new_tensor({2, width}, ScalarType::Double, true) : new_tensor({0}, ScalarType::Double);
  double* sums = moments ? static_cast<double*>(result.mutable_data_ptr()) : nullptr;
  void* data = y.mutable_data_ptr();
  if (h.rows == 0 || width == 0) return result;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (h.dtype == ScalarType::Float) {
      run<T, float>(static_cast<T*>(data), y.stride(0), width, h, expansion, sums, width);
    } else {
      run<T, T>(static_cast<T*>(data), y.stride(0), width, h, expansion, sums, width);
    }
  });
  return result;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("expand_", TORCH_BOX(&fastlora::expand_)); }

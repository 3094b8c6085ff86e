// Small operands of the skinny products, copied once per call into the layout that the kernels read.
#pragma once
#include "cpu/common.h"

namespace fastlora {

// out[i, j] = a[i, j], or a[j, i] when transposed; a may have any strides.
template <class T>
void copy_as_float(const T* a, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, float* out) {
  if (column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) kernels().of<T>().widen(a + i * row_stride, out + i * columns, columns);
    return;
  }
  // Blocks of columns, so that the lines read for one row serve the next.
  constexpr int64_t kBlock = 16;
  for (int64_t j = 0; j < columns; j += kBlock) {
    const int64_t count = std::min(kBlock, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      float part[kBlock];
      T read[kBlock] = {};
      for (int64_t q = 0; q < count; ++q) read[q] = a[i * row_stride + (j + q) * column_stride];
      kernels().of<T>().widen(read, part, count);
      std::copy_n(part, count, out + i * columns + j);
    }
  }
}

inline void copy_as_float(const float* a, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                          float* out) {
  if (column_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(a + i * row_stride, columns, out + i * columns);
    return;
  }
  constexpr int64_t kBlock = 16;
  for (int64_t j = 0; j < columns; j += kBlock) {
    const int64_t count = std::min(kBlock, columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = a + i * row_stride + j * column_stride;
      float* to = out + i * columns + j;
      for (int64_t q = 0; q < count; ++q) to[q] = from[q * column_stride];
    }
  }
}

// values[i] as if they had been stored in a narrower type.
inline void round_through(ScalarType dtype, float* values, int64_t count) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>) {
      constexpr int64_t kBlock = 512;
      T narrow[kBlock];
      for (int64_t i = 0; i < count; i += kBlock) {
        const int64_t some = std::min(kBlock, count - i);
        kernels().of<T>().narrow(values + i, narrow, some);
        kernels().of<T>().widen(narrow, values + i, some);
      }
    }
  });
}

// out = scale * a (or a^T) in fp32, contiguous, where a is first rounded to `rounded`, the dtype of its partner.
inline void pack(const Tensor& a, float scale, ScalarType rounded, float* out, bool transposed = false) {
  const ScalarType dtype = a.scalar_type();
  const int row = transposed ? 1 : 0, column = 1 - row;
  const int64_t rows = a.size(row), columns = a.size(column), count = rows * columns;
  if (count == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    copy_as_float(static_cast<const T*>(a.const_data_ptr()), a.stride(row), a.stride(column), rows, columns, out);
  });
  if (dtype != rounded) round_through(rounded, out, count);
  if (scale != 1.0f) {
    for (int64_t i = 0; i < count; ++i) out[i] *= scale;
  }
}

// fp32 values that are exact in bf16, as operands of the products of bf16 pairs; nothing where those are not used.
inline Scratch<bf16> pack_pairs(const Scratch<float>& exact, int64_t count, ScalarType dtype) {
  const bool used = dtype == ScalarType::BFloat16 && kernels().dot_bf16;
  Scratch<bf16> out(used ? count : 0);
  if (used) kernels().of_bf16.narrow(exact.get(), out.get(), count);
  return out;
}

// From the probe columns of one projection to those of the next: 0 where all meet the same ones.
inline int64_t probe_stride(int64_t columns, int64_t probes, size_t projections) {
  return columns == probes * static_cast<int64_t>(projections) ? probes : 0;
}

// Columns of h that one projection meets, side by side: its own ranks, then the probes.
template <class T>
void gather(const T* h, int64_t ldh, int64_t rows, int64_t offset, int64_t rank, int64_t first_probe, int64_t probes,
            T* out) {
  for (int64_t m = 0; m < rows; ++m, h += ldh) {
    for (int64_t r = 0; r < rank; ++r) *out++ = h[offset + r];
    for (int64_t r = 0; r < probes; ++r) *out++ = h[first_probe + r];
  }
}

// to[n, r] = scale * from[r, n]
inline void transpose(const float* from, int64_t rank, int64_t columns, float scale, float* to) {
  constexpr int64_t kBlock = 16;
  int64_t n = 0;
  for (; n + kBlock <= columns; n += kBlock) {
    for (int64_t r = 0; r < rank; ++r) {
      const float* some = from + r * columns + n;
      float* there = to + n * rank + r;
#pragma GCC unroll 16
      for (int64_t q = 0; q < kBlock; ++q) there[q * rank] = scale * some[q];
    }
  }
  for (; n < columns; ++n) {
    for (int64_t r = 0; r < rank; ++r) to[n * rank + r] = scale * from[r * columns + n];
  }
}

// A tensor of fp32 values narrowed to a dtype.
inline void write_as(ScalarType dtype, const float* values, int64_t count, Tensor& to) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* data = static_cast<T*>(to.mutable_data_ptr());
    kernels().of<T>().narrow(values, data, count);
  });
}

}  // namespace fastlora

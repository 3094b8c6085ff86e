// Blocks of rows as the kernels multiply them: as fp32, or as pairs of bf16 where the processor has their product.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace fastlora {

// Whether rows of this dtype are multiplied as pairs of bf16, with fp32 sums; all others are widened to fp32.
inline bool in_pairs(ScalarType dtype) { return dtype == ScalarType::BFloat16 && kernels().dot_bf16; }

// Calls f with values of two types: that of rows in memory, and the one that they are multiplied in.
template <class F>
void with_types(ScalarType dtype, const F& f) {
  with_type(dtype, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), bf16>) {
      if (in_pairs(ScalarType::BFloat16)) return f(type, bf16{});
    }
    f(type, float{});
  });
}

template <class V>
struct RowsOf {
  const V* data;
  int64_t stride;
};

// Rows of type T as V: the data itself, or a widened copy in the scratch memory.
template <class V, class T>
RowsOf<V> rows_as(const T* from, int64_t stride, int64_t rows, int64_t columns, V* scratch) {
  if constexpr (std::is_same_v<V, T>) {
    return {from, stride};
  } else {
    const TypedKernels<T>& typed = kernels().of<T>();
    if (stride == columns) {
      typed.widen(from, scratch, rows * columns);
    } else {
      for (int64_t m = 0; m < rows; ++m) typed.widen(from + m * stride, scratch + m * columns, columns);
    }
    return {scratch, columns};
  }
}

// How many elements that scratch memory needs.
template <class V, class T>
int64_t scratch_for(int64_t count) {
  return std::is_same_v<V, T> ? 0 : count;
}

// s[m, r] = sum_k x[m, k] a[r, k]
inline void dot(const RowsOf<float>& x, int64_t rows, const RowsOf<float>& a, int64_t rank, int64_t depth, float* s,
                int64_t lds) {
  kernels().dot(x.data, x.stride, rows, a.data, a.stride, rank, depth, s, lds);
}
inline void dot(const RowsOf<bf16>& x, int64_t rows, const RowsOf<bf16>& a, int64_t rank, int64_t depth, float* s,
                int64_t lds) {
  kernels().dot_bf16(x.data, x.stride, rows, a.data, a.stride, rank, depth, s, lds);
}

// g[r, n] += sum_m d[m, r] x[m, n], where g is contiguous
inline void add_outer(const RowsOf<float>& d, int64_t rank, const RowsOf<float>& x, int64_t rows, int64_t columns,
                      float* g) {
  kernels().outer(d.data, d.stride, rank, x.data, x.stride, rows, columns, g, columns);
}
inline void add_outer(const RowsOf<bf16>& d, int64_t rank, const RowsOf<bf16>& x, int64_t rows, int64_t columns,
                      float* g) {
  kernels().outer_bf16(d.data, d.stride, rank, x.data, x.stride, rows, columns, g, columns);
}

}  // namespace fastlora

// The operands of one call: projections that share x, their factors copied once into the layout that the kernels read,
// and the matrices that are read and written in place.
#pragma once
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/checks.h"
#include "cpu/rows.h"

namespace fastlora {

typedef float Square __attribute__((vector_size(16)));

// to[j, i] = scale * from[i, j], in squares of four vectors; strides count elements, and the last one of both is 1.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float scale, float* to,
                      int64_t ld_to) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4) {
    for (int64_t j = 0; j < whole_columns; j += 4) {
      Square row[4];
      for (int q = 0; q < 4; ++q) __builtin_memcpy(&row[q], from + (i + q) * ld_from + j, sizeof row[q]);
      const Square a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Square b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Square c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Square d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      row[0] = scale * __builtin_shufflevector(a, c, 0, 1, 4, 5);
      row[1] = scale * __builtin_shufflevector(a, c, 2, 3, 6, 7);
      row[2] = scale * __builtin_shufflevector(b, d, 0, 1, 4, 5);
      row[3] = scale * __builtin_shufflevector(b, d, 2, 3, 6, 7);
      for (int q = 0; q < 4; ++q) __builtin_memcpy(to + (j + q) * ld_to + i, &row[q], sizeof row[q]);
    }
    for (int64_t j = whole_columns; j < columns; ++j) {
      for (int q = 0; q < 4; ++q) to[j * ld_to + i + q] = scale * from[(i + q) * ld_from + j];
    }
  }
  for (int64_t i = whole_rows; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * ld_to + i] = scale * from[i * ld_from + j];
  }
}

// A contiguous tensor of fp32 values narrowed to its dtype.
inline void write_as_dtype(const float* values, int64_t count, Tensor& to) {
  with_type(to.scalar_type(), [&](auto type) {
    using T = decltype(type);
    kernels().of<T>().narrow(values, static_cast<T*>(to.mutable_data_ptr()), count);
  });
}

// to [columns, rank] = scale * from^T, narrowed to its dtype.
inline void write_transposed(const float* from, int64_t rank, int64_t columns, float scale, Tensor& to) {
  if (to.scalar_type() == ScalarType::Float) {
    transpose(from, columns, rank, columns, scale, static_cast<float*>(to.mutable_data_ptr()), rank);
    return;
  }
  const Scratch<float> as_fp32(columns * rank);
  transpose(from, columns, rank, columns, scale, as_fp32.get(), rank);
  write_as_dtype(as_fp32.get(), columns * rank, to);
}

// out[i, j] = a[i, j], where a may have any strides.
template <class T>
void copy_as_fp32(const T* a, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, float* out) {
  if (column_stride == 1) {
    if (row_stride == columns) columns *= std::exchange(rows, 1);
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

inline void copy_as_fp32(const float* a, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                         float* out) {
  if (column_stride == 1) {
    if (row_stride == columns) columns *= std::exchange(rows, 1);
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

// out = a in fp32, contiguous, first rounded to `rounded`, the dtype of its partner.
inline void pack(const Tensor& a, ScalarType rounded, float* out) {
  const ScalarType dtype = a.scalar_type();
  const int64_t rows = a.size(0), columns = a.size(1);
  if (rows * columns == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    copy_as_fp32(static_cast<const T*>(a.const_data_ptr()), a.stride(0), a.stride(1), rows, columns, out);
  });
  if (dtype != rounded) round_through(rounded, out, rows * columns);
}

// out [rank, columns] = scale * B^T in fp32, with B rounded to `rounded`; scratch holds as many values.
inline void pack_transposed(const Tensor& B, float scale, ScalarType rounded, float* scratch, float* out) {
  const int64_t columns = B.size(0), rank = B.size(1);
  if (columns * rank == 0) return;
  if (B.scalar_type() == ScalarType::Float && rounded == ScalarType::Float && B.stride(1) == 1) {
    transpose(static_cast<const float*>(B.const_data_ptr()), B.stride(0), columns, rank, scale, out, columns);
    return;
  }
  pack(B, rounded, scratch);
  transpose(scratch, rank, columns, rank, scale, out, columns);
}

// Packed factors in fp32 and, for rows that are multiplied as pairs of bf16, in bf16.
struct Packed {
  Scratch<float> fp32{0};
  Scratch<bf16> pairs{0};

  Packed() = default;
  Packed(int64_t count, bool as_pairs) : fp32(count), pairs(as_pairs ? count : 0) {}

  // Values first.. of fp32, which are exact in bf16.
  void write_pairs(int64_t first, int64_t count) {
    if (pairs.get()) kernels().of_bf16.narrow(fp32.get() + first, pairs.get() + first, count);
  }

  template <class V>
  const V* as() const {
    if constexpr (std::is_same_v<V, bf16>) {
      return pairs.get();
    } else {
      return fp32.get();
    }
  }
};

// One projection: ranks offset.. of h, columns column.. of matrix `output` (-1: it has none), `block` of them together
// and `stride` from one block to the next.
struct Slot {
  int64_t rank, columns, offset, output, column;
  float scale;
  int64_t block = columns, stride = 0;
  int64_t packed = 0;  // where scale * B^T, [rank, columns], lies among the packed factors

  // Calls f(first of its columns, where they lie, how many) for each block.
  template <class F>
  void each_block(const F& f) const {
    for (int64_t n = 0, at = column; n < columns; n += block, at += stride) f(n, at, block);
  }
};

// Projections that share x.
struct Group {
  std::vector<Slot> slots;
  int64_t rank = 0;    // of h, without the probes
  int64_t packed = 0;  // elements of all factors B
  int64_t widest = 0;  // columns of the widest projection
  bool interleaves = false;

  void add(Slot slot) {
    slot.packed = packed;
    interleaves |= slot.block < slot.columns;
    packed += slot.rank * slot.columns;
    widest = std::max(widest, slot.columns);
    slots.push_back(slot);
  }
};

// What all adapters of a layer have in common: the widths of the matrices, and where their projections lie in them.
struct Places {
  const std::vector<int64_t>&outputs, &columns, &widths;
  int64_t depth;  // in_features

  bool interleave() const { return columns.size() == 3 * outputs.size(); }
};

inline void check_columns(const Places& places) {
  if (!places.interleave()) check_entries(places.columns.size(), "columns", places.outputs.size(), "outputs");
}

inline void check_operand(const Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  check_dtype(tensor.scalar_type(), name);
}

// Adds projection i, whose A [rank, depth] and B [columns, rank] have been found to be operands of one rank.
inline void add_projection(Group& group, const Tensor& A, const Tensor& B, double scale, const Places& places,
                           size_t i) {
  Slot slot{B.size(1), B.size(0), group.rank, places.outputs[i], places.columns[i], static_cast<float>(scale)};
  if (places.interleave()) {
    slot.block = places.columns[places.outputs.size() + i], slot.stride = places.columns[2 * places.outputs.size() + i];
    STD_TORCH_CHECK(
        slot.columns == 0 || (slot.block > 0 && slot.columns % slot.block == 0 && slot.stride >= slot.block),
        "columns: blocks of ", slot.block, " every ", slot.stride, " were asked for, of ", slot.columns);
  }
  const int64_t last = slot.columns == slot.block ? 0 : (slot.columns / slot.block - 1) * slot.stride;
  const int64_t end = slot.column + last + slot.block;
  const int64_t matrices = static_cast<int64_t>(places.widths.size());
  STD_TORCH_CHECK(A.size(1) == places.depth, "A has ", A.size(1), " columns, but x has ", places.depth,
                  " (in_features)");
  STD_TORCH_CHECK(slot.output >= -1 && slot.output < matrices, "outputs: ", slot.output, " was asked for, of ",
                  matrices);
  const int64_t width = slot.output < 0 ? 0 : places.widths[slot.output];
  STD_TORCH_CHECK(slot.output < 0 || (slot.column >= 0 && end <= width), "columns: ", slot.column, " to ", end,
                  " were asked for, but there are ", width);
  group.rank += slot.rank;
  group.add(slot);
}

// The projections of one adapter, in the order of their ranks in h.
inline Group read_group(const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<double>& scales,
                        const Places& places) {
  check_entries(B.size(), "B", A.size(), "A");
  check_entries(places.outputs.size(), "outputs", A.size(), "A");
  check_columns(places);
  check_entries(scales.size(), "scales", A.size(), "A");
  Group group;
  group.slots.reserve(A.size());
  for (size_t i = 0; i < A.size(); ++i) {
    check_operand(A[i], "A");
    check_operand(B[i], "B");
    STD_TORCH_CHECK(A[i].size(0) == B[i].size(1), "A has ", A[i].size(0), " rows, but B has ", B[i].size(1),
                    " columns (rank)");
    add_projection(group, A[i], B[i], scales[i], places, i);
  }
  return group;
}

// scale_i B_i^T of every projection that has an output; as pairs without the scale, which is not exact in bf16.
inline Packed pack_B(const Group& group, const std::vector<Tensor>& B, ScalarType rounded, bool as_pairs) {
  Packed out(group.packed, as_pairs);
  int64_t largest = 0;
  for (const Slot& slot : group.slots) largest = std::max(largest, slot.rank * slot.columns);
  const Scratch<float> scratch(largest);
  for (size_t i = 0; i < B.size(); ++i) {
    const Slot& slot = group.slots[i];
    if (slot.output < 0) continue;
    pack_transposed(B[i], as_pairs ? 1.0f : slot.scale, rounded, scratch.get(), out.fp32.get() + slot.packed);
    out.write_pairs(slot.packed, slot.rank * slot.columns);
  }
  return out;
}

// [A_0; A_1; ...; P], with extra rows for P.
inline Packed pack_A(const Group& group, const std::vector<Tensor>& A, const std::optional<Tensor>& P, int64_t depth,
                     ScalarType rounded, bool as_pairs) {
  const int64_t rows = group.rank + (P ? P->size(0) : 0);
  Packed out(rows * depth, as_pairs);
  for (size_t i = 0; i < A.size(); ++i) pack(A[i], rounded, out.fp32.get() + group.slots[i].offset * depth);
  if (P) pack(*P, rounded, out.fp32.get() + group.rank * depth);
  out.write_pairs(0, rows * depth);
  return out;
}

// Four at a time, since a few elements are fewer than a call to copy them is worth; the end of the copies.
template <class V>
V* copy_few(const V* from, int64_t count, V* to) {
  for (; count >= 4; count -= 4, from += 4, to += 4) std::memcpy(to, from, 4 * sizeof(V));
  for (; count > 0; --count) *to++ = *from++;
  return to;
}

// The columns of h that dy of one projection is multiplied with, side by side: `rank` from `offset`, then the probes.
template <class V>
RowsOf<V> columns_of_h(const RowsOf<V>& h, int64_t rows, int64_t offset, int64_t rank, int64_t first_probe,
                       int64_t probes, V* scratch) {
  if (probes == 0) return {h.data + offset, h.stride};
  if (rank == 0) return {h.data + first_probe, h.stride};
  const V* from = h.data;
  V* to = scratch;
  for (int64_t m = 0; m < rows; ++m, from += h.stride) {
    to = copy_few(from + first_probe, probes, copy_few(from + offset, rank, to));
  }
  return {scratch, rank + probes};
}

// One row's columns of a projection side by side.
template <class V, class T>
void copy_columns(const T* row, const Slot& slot, V* to) {
  slot.each_block([&](int64_t n, int64_t at, int64_t count) {
    if constexpr (std::is_same_v<V, T>) {
      std::copy_n(row + at, count, to + n);
    } else {
      kernels().of<T>().widen(row + at, to + n, count);
    }
  });
}

// The ranks of one projection in rows of dh, which were multiplied by B without the scale.
inline void scale_ranks(float* dh, int64_t rank, int64_t rows, const Slot& slot) {
  dh += slot.offset;
  for (int64_t m = 0; m < rows; ++m, dh += rank) {
    for (int64_t r = 0; r < slot.rank; ++r) dh[r] *= slot.scale;
  }
}

// A matrix that is written in place.
struct Target {
  void* data;
  int64_t rows, columns, stride;

  template <class T>
  T* row(int64_t m) const {
    return static_cast<T*>(data) + m * stride;
  }
};

inline Target write_target(Tensor& tensor, const char* name, const Matrix& x) {
  check_matrix(tensor, name);
  check_same_dtype(tensor.scalar_type(), name, x.dtype, "x");
  check_rows(tensor.size(0), name, x.rows, "x");
  check_unit_columns(tensor, name);
  return {tensor.mutable_data_ptr(), x.rows, tensor.size(1), tensor.stride(0)};
}

// What a forward reads and writes: x [M, K], y_j [M, N_j], and where the moments of y_j lie among the sums.
struct ForwardOperands {
  Matrix x;
  std::vector<Target> y;
  std::vector<int64_t> widths, first;
  int64_t sums = 0;  // doubles that are added up; 0 without moments
};

inline ForwardOperands read_forward(const Tensor& x, std::vector<Tensor>& y, const std::vector<int64_t>& outputs,
                                    bool moments) {
  ForwardOperands out{read_matrix(x, "x"), {}, {}, {}};
  for (Tensor& target : y) {
    out.y.push_back(write_target(target, "y", out.x));
    out.widths.push_back(out.y.back().columns);
    out.first.push_back(out.sums);
    if (moments) out.sums += 2 * out.widths.back();
  }
  for (const int64_t output : outputs) STD_TORCH_CHECK(output != -1, "outputs: -1 is for the backward only");
  return out;
}

// What a backward reads and writes: x [M, K], h [M, R + k], dy_j [M, N_j] and dx [M, K].
struct BackwardOperands {
  Matrix x, h;
  std::vector<Matrix> dy;
  std::vector<int64_t> widths;
  std::optional<Target> dx;
};

inline BackwardOperands read_inputs(const Tensor& x, const Tensor& h, const std::vector<Tensor>& dy,
                                    std::optional<Tensor>& dx) {
  BackwardOperands out{read_matrix(x, "x"), {}, {}, {}, std::nullopt};
  for (const Tensor& grad : dy) {
    out.dy.push_back(read_matrix(grad, "dy"));
    check_same_dtype(out.dy.back().dtype, "dy", out.x.dtype, "x");
    check_rows(out.dy.back().rows, "dy", out.x.rows, "x");
    out.widths.push_back(out.dy.back().columns);
  }
  out.h = read_matrix(h, "h");
  check_same_dtype(out.h.dtype, "h", out.x.dtype, "x");
  check_rows(out.h.rows, "h", out.x.rows, "x");
  if (!dx) return out;
  out.dx = write_target(*dx, "dx", out.x);
  STD_TORCH_CHECK(out.dx->columns == out.x.columns, "dx has ", out.dx->columns, " columns, but x has ", out.x.columns);
  return out;
}

}  // namespace fastlora

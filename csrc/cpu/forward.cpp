// The forward of one adapter in one pass over row blocks, after the frozen matmul has written y: lora_forward_.
#include "cpu/fused.h"
#include "cpu/masks.h"
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace fastlora {
namespace {

struct ForwardCall : ForwardOperands {
  Group group;
  Packed A, B;
  Masks masks;
  int64_t width = 0;            // columns of h
  std::vector<int64_t> picked;  // columns of x that are the last ones of h
};

// The columns of x that are columns of h, as they are.
template <class T>
void pick_rows(const ForwardCall& call, int64_t m, int64_t rows, T* h) {
  const int64_t count = static_cast<int64_t>(call.picked.size());
  for (int64_t row = m; count && row < m + rows; ++row) {
    const T* x = call.x.row<T>(row);
    T* out = h + (row + 1) * call.width - count;
    for (int64_t i = 0; i < count; ++i) out[i] = x[call.picked[i]];
  }
}

// Rows of x that each projection's mask has passed, and the masks.
template <class V>
struct KeptRows {
  Scratch<V> x;
  Scratch<uint32_t> bits;

  KeptRows(const ForwardCall& call, int64_t block)
      : x(call.masks ? block * call.x.columns : 0), bits(call.masks ? block * call.masks.words : 0) {}
};

// h of rows from row m: each projection sees the x of its own mask, the probes all of it.
template <class V>
void dot_kept(const ForwardCall& call, int64_t m, int64_t rows, const RowsOf<V>& x, const KeptRows<V>& kept, float* s,
              int64_t probes) {
  const int64_t depth = call.x.columns, rank = call.group.rank;
  const V* A = call.A.as<V>();
  for (size_t i = 0; i < call.group.slots.size(); ++i) {
    const Slot& slot = call.group.slots[i];
    if (slot.rank == 0) continue;
    call.masks.write(i, m, rows, kept.bits.get());
    keep_rows(call.masks, x.data, x.stride, rows, kept.bits.get(), kept.x.get());
    dot({kept.x.get(), depth}, rows, {A + slot.offset * depth, depth}, slot.rank, depth, s + slot.offset, call.width);
  }
  scale_kept(call.masks, s, call.width, rows, rank);
  dot(x, rows, {A + rank * depth, depth}, probes, depth, s + rank, call.width);
}

template <class T, class V>
void run_rows(const ForwardCall& call, int64_t begin, int64_t end, int64_t block, T* h, double* sums) {
  const int64_t depth = call.x.columns, width = call.width;
  const int64_t multiplied = width - static_cast<int64_t>(call.picked.size());
  const TypedKernels<T>& typed = kernels().of<T>();
  const Scratch<V> x_rows(scratch_for<V, T>(block * depth));
  const Scratch<float> h_as_fp32(scratch_for<float, T>(block * width));
  const KeptRows<V> kept(call, block);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    const RowsOf<V> x = rows_as(call.x.row<T>(m), call.x.stride, rows, depth, x_rows.get());
    float* s = h_as_fp32.get();
    if constexpr (std::is_same_v<T, float>) s = h + m * width;
    // Columns that are picked are left as they are.
    if (call.masks) {
      dot_kept(call, m, rows, x, kept, s, multiplied - call.group.rank);
    } else {
      dot(x, rows, {call.A.as<V>(), depth}, multiplied, depth, s, width);
    }
    if constexpr (!std::is_same_v<T, float>) typed.narrow(s, h + m * width, rows * width);
    pick_rows<T>(call, m, rows, h);
    for (const Slot& slot : call.group.slots) {
      if (slot.rank == 0) continue;
      const Target& y = call.y[slot.output];
      typed.expand(s + slot.offset, width, rows, call.B.fp32.get() + slot.packed, slot.columns, slot.rank, slot.columns,
                   y.row<T>(m) + slot.column, y.stride);
    }
    for (size_t j = 0; sums && j < call.y.size(); ++j) {
      const Target& y = call.y[j];
      double* to = sums + call.first[j];
      typed.moments(y.row<T>(m), y.stride, rows, y.columns, to, to + y.columns);
    }
  }
}

void run(const ForwardCall& call, Tensor& h, std::vector<Tensor>& moments) {
  int64_t widest = call.x.columns;
  for (const int64_t width : call.widths) widest = std::max(widest, width);
  const int64_t block = block_rows(widest);
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(call.x.rows, 2 * (call.group.packed + call.group.rank * call.x.columns));
  const Scratch<double> partial(parts.count * call.sums);
  std::fill_n(partial.get(), parts.count * call.sums, 0.0);
  with_types(call.x.dtype, [&](auto type, auto multiplied) {
    using T = decltype(type);
    T* out = static_cast<T*>(h.mutable_data_ptr());
    parts.run([&](int64_t part, int64_t begin, int64_t end) {
      run_rows<T, decltype(multiplied)>(call, begin, end, block, out,
                                        call.sums ? partial.get() + part * call.sums : nullptr);
    });
  });
  for (size_t j = 0; j < moments.size(); ++j) {
    double* out = static_cast<double*>(moments[j].mutable_data_ptr());
    for (int64_t i = 0; i < 2 * call.widths[j]; ++i) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts.count; ++part) sum += partial.get()[part * call.sums + call.first[j] + i];
      out[i] = sum;
    }
  }
}

// Columns of x by number, of a contiguous int64 matrix [projections, k].
std::vector<int64_t> read_columns(const Tensor& P, int64_t depth) {
  check_matrix(P, "P");
  STD_TORCH_CHECK(P.is_contiguous(), "P names columns of x and is not contiguous");
  const int64_t* data = static_cast<const int64_t*>(P.const_data_ptr());
  std::vector<int64_t> columns(data, data + P.size(0) * P.size(1));
  for (const int64_t column : columns) {
    STD_TORCH_CHECK(column >= 0 && column < depth, "P names column ", column, "; x has ", depth, " (in_features)");
  }
  return columns;
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> lora_forward_(std::vector<Tensor> y, const Tensor& x_,
                                                      const std::vector<Tensor>& A, const std::optional<Tensor>& P,
                                                      const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                                                      const std::vector<int64_t>& columns,
                                                      const std::vector<double>& scales, bool moments,
                                                      const std::optional<Tensor>& seed, double p,
                                                      const std::vector<int64_t>& streams) {
  ForwardCall call{read_forward(x_, y, outputs, moments), {}};
  const Matrix& x = call.x;
  call.group = read_group(A, B, scales, {outputs, columns, call.widths, x.columns});
  call.masks = read_masks(seed, p, streams, A.size(), x.columns);
  const bool picks = P && P->scalar_type() == ScalarType::Long;
  if (picks) {
    call.picked = read_columns(*P, x.columns);
  } else if (P) {
    check_operand(*P, "P");
    STD_TORCH_CHECK(P->size(1) == x.columns, "P has ", P->size(1), " columns, but x has ", x.columns, " (in_features)");
  }
  call.width = call.group.rank + (P && !picks ? P->size(0) : static_cast<int64_t>(call.picked.size()));
  call.A = pack_A(call.group, A, picks ? std::nullopt : P, x.columns, x.dtype, in_pairs(x.dtype));
  call.B = pack_B(call.group, B, x.dtype, false);
  Tensor h = new_tensor({x.rows, call.width}, x.dtype);
  std::vector<Tensor> result;
  for (size_t j = 0; moments && j < y.size(); ++j) {
    result.push_back(new_tensor({2, call.widths[j]}, ScalarType::Double));
  }
  run(call, h, result);
  return {h, result};
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("lora_forward_", TORCH_BOX(&fastlora::lora_forward_)); }

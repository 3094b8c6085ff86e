// What the fused backward and wgrad, which leaves dx to others, do with a block of rows of one adapter:
// dh_i = scale_i dy_i B_i    dB_i = scale_i dy_i^T h_i    Q_i = dy_i^T h_P    dA = dh^T x
// h_P are the columns of h after the ranks: the same for every projection, or a run for each.
#pragma once
#include "cpu/operands.h"
#include "cpu/parallel.h"

namespace fastlora {

struct BackwardCall : BackwardOperands {
  Group group;
  Packed A, B;  // A for dx alone
  int64_t probes = 0;
  int64_t probe_stride = 0;  // from the probes of one projection to those of the next; 0 where all have the same
  bool need_dA = false, need_dB = false;
  std::vector<int64_t> gradient{};  // of [rank + probes, columns] of every projection in the sums of a part
  int64_t first_dA = 0, sums = 0;

  int64_t widest() const { return std::max(group.widest, x.columns); }
  int64_t used_rank(const Slot& slot) const { return need_dB ? slot.rank : 0; }

  // Sums over rows: dB and Q of every projection, then dA.
  void place_sums() {
    const int64_t projections = static_cast<int64_t>(group.slots.size());
    probe_stride = h.columns - group.rank == probes * projections ? probes : 0;
    for (const Slot& slot : group.slots) {
      gradient.push_back(sums);
      sums += (used_rank(slot) + probes) * slot.columns;
    }
    first_dA = sums;
    if (need_dA) sums += group.rank * x.columns;
  }
};

// Memory for a block of rows of type T that are multiplied as V.
template <class T, class V>
struct BackwardScratch {
  Scratch<float> as_fp32;
  Scratch<V> h, columns_of_h, columns_of_dy;

  BackwardScratch(const BackwardCall& call, int64_t block)
      : as_fp32(scratch_for<float, T>(block * call.widest())),
        h(scratch_for<V, T>(block * call.h.columns)),
        columns_of_h(block * call.h.columns),
        columns_of_dy(call.group.interleaves ? block * call.group.widest : 0) {}
  V* dy() const {
    if constexpr (std::is_same_v<V, float>) {
      return as_fp32.get();
    } else {
      return nullptr;
    }
  }
};

// The columns of dy that are one projection's, in rows m..
template <class T, class V>
RowsOf<V> rows_of_dy(const Matrix& dy, const Slot& slot, int64_t m, int64_t rows,
                     const BackwardScratch<T, V>& scratch) {
  if (slot.block == slot.columns) {
    return rows_as(dy.row<T>(m) + slot.column, dy.stride, rows, slot.columns, scratch.dy());
  }
  V* to = scratch.columns_of_dy.get();
  for (int64_t i = 0; i < rows; ++i) copy_columns(dy.row<T>(m + i), slot, to + i * slot.columns);
  return {to, slot.columns};
}

// dh, and the products of dy with the columns of h: dB and Q of every projection.
template <class T, class V>
void run_slots(const BackwardCall& call, int64_t m, int64_t rows, const BackwardScratch<T, V>& scratch, float* dh,
               float* sums) {
  const int64_t rank = call.group.rank;
  const RowsOf<V> h = rows_as(call.h.row<T>(m), call.h.stride, rows, call.h.columns, scratch.h.get());
  for (size_t i = 0; i < call.group.slots.size(); ++i) {
    const Slot& slot = call.group.slots[i];
    if (slot.output < 0) continue;
    const RowsOf<V> dy = rows_of_dy<T, V>(call.dy[slot.output], slot, m, rows, scratch);
    dot(dy, rows, {call.B.as<V>() + slot.packed, slot.columns}, slot.rank, slot.columns, dh + slot.offset, rank);
    if constexpr (std::is_same_v<V, bf16>) scale_ranks(dh, rank, rows, slot);
    const int64_t first_probe = rank + static_cast<int64_t>(i) * call.probe_stride, used = call.used_rank(slot);
    const RowsOf<V> columns =
        columns_of_h(h, rows, slot.offset, used, first_probe, call.probes, scratch.columns_of_h.get());
    add_outer(columns, used + call.probes, dy, rows, slot.columns, sums + call.gradient[i]);
  }
}

// dA of all projections, from dh.
template <class T>
void add_dA(const BackwardCall& call, int64_t m, int64_t rows, float* as_fp32, const float* dh, float* sums) {
  const int64_t depth = call.x.columns, rank = call.group.rank;
  const RowsOf<float> x = rows_as(call.x.row<T>(m), call.x.stride, rows, depth, as_fp32);
  add_outer({dh, rank}, rank, x, rows, depth, sums + call.first_dA);
}

}  // namespace fastlora

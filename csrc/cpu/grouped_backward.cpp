// The backward of many adapters, each on its own rows of the batch, in one pass after the frozen matmul has written dx:
// lora_grouped_backward_.
#include "cpu/grouped.h"

namespace fastlora {
namespace {

struct Gradients {
  std::vector<Tensor> dA, dB, Q;
};

struct GroupedBackwardCall : BackwardOperands, GroupedCall {
  const std::vector<Tensor>&A, &B;
  bool need_dA = false, need_dB = false, need_Q = false;

  bool need_dh() const { return need_dA || dx; }
  int64_t used_rank(const Slot& slot) const { return need_dB ? slot.rank : 0; }
  // Sums of an adapter: dB and Q of every projection, [rank + probes, columns], then dA.
  int64_t sums(int64_t g) const {
    int64_t out = need_dA ? rank(g) * x.columns : 0;
    for (const Slot& slot : adapters.groups[g].slots) out += (used_rank(slot) + adapters.probes[g]) * slot.columns;
    return out;
  }
};

// One thread's share of the rows, which are of type T and multiplied as V.
template <class T, class V>
class BackwardPart {
  static constexpr bool kPairs = std::is_same_v<V, bf16>;

 public:
  BackwardPart(const GroupedBackwardCall& call, int64_t block, int64_t widest)
      : call_(call),
        block_(block),
        A_(call.dx ? call.largest([&](int64_t g) { return call.rank(g) * call.x.columns; }) : 0),
        unpacked_(call.largest([&](int64_t g) { return call.packed(g); })),
        as_fp32_(block * widest),
        dh_(block * call.largest([&](int64_t g) { return call.rank(g); })),
        B_(call.need_dh() ? call.largest([&](int64_t g) { return call.packed(g); }) : 0, kPairs),
        dy_(kPairs ? block * widest : 0),
        h_(block * call.h.columns),
        columns_of_h_(block * call.h.columns),
        dx_(block * call.x.columns) {}

  void run(const Segment& segment, float* sums) {
    adapter_ = segment.adapter;
    group_ = &call_.adapters.groups[adapter_];
    pack_factors();
    // Projections without a gradient contribute nothing.
    std::fill_n(dh_.get(), block_ * group_->rank, 0.0f);
    for_each_block(call_.segments.order, segment, block_, [&](const Rows& rows) { run_block(rows, sums); });
  }

 private:
  void pack_factors() {
    const size_t count = group_->slots.size();
    for (size_t i = 0; i < count; ++i) {
      const Slot& slot = group_->slots[i];
      const size_t at = adapter_ * count + i;
      if (call_.dx) pack(call_.A[at], call_.x.dtype, A_.get() + slot.offset * call_.x.columns);
      if (!call_.need_dh() || slot.output < 0) continue;
      // The scale is not exact in bf16.
      pack_transposed(call_.B[at], kPairs ? 1.0f : slot.scale, call_.x.dtype, unpacked_.get(),
                      B_.fp32.get() + slot.packed);
      B_.write_pairs(slot.packed, slot.rank * slot.columns);
    }
  }

  // Where rows of dy are copied to.
  V* dy_scratch() const {
    if constexpr (kPairs) {
      return dy_.get();
    } else {
      return as_fp32_.get();
    }
  }

  // The columns of dy that are one projection's.
  RowsOf<V> rows_of_dy(const Slot& slot, const Rows& rows) {
    const Matrix& dy = call_.dy[slot.output];
    if (slot.block == slot.columns) {
      return rows_as(dy.row<T>(0) + slot.column, dy.stride, rows, slot.columns, dy_scratch());
    }
    V* to = dy_scratch();
    for (int64_t i = 0; i < rows.count; ++i) copy_columns(dy.row<T>(rows.at(i)), slot, to + i * slot.columns);
    return {to, slot.columns};
  }

  // dh, and the products of dy with the columns of h, dB and Q of every projection; the end of what it added to.
  float* run_slots(const Rows& rows, float* sums) {
    const int64_t rank = group_->rank, probes = call_.adapters.probes[adapter_];
    const RowsOf<V> h = rows_as(call_.h.row<T>(0), call_.h.stride, rows, rank + probes, h_.get());
    for (const Slot& slot : group_->slots) {
      const int64_t used = call_.used_rank(slot);
      if (slot.output >= 0) {
        const RowsOf<V> dy = rows_of_dy(slot, rows);
        if (call_.need_dh()) {
          const RowsOf<V> B{B_.template as<V>() + slot.packed, slot.columns};
          dot(dy, rows.count, B, slot.rank, slot.columns, dh_.get() + slot.offset, rank);
          if constexpr (kPairs) scale_ranks(dh_.get(), rank, rows.count, slot);
        }
        const RowsOf<V> columns = columns_of_h(h, rows.count, slot.offset, used, rank, probes, columns_of_h_.get());
        add_outer(columns, used + probes, dy, rows.count, slot.columns, sums);
      }
      sums += (used + probes) * slot.columns;
    }
    return sums;
  }

  void run_block(const Rows& rows, float* sums) {
    const int64_t depth = call_.x.columns, rank = group_->rank;
    sums = run_slots(rows, sums);
    if (rank == 0) return;
    if (call_.need_dA) {
      const RowsOf<float> x = rows_as(call_.x.row<T>(0), call_.x.stride, rows, depth, as_fp32_.get());
      add_outer({dh_.get(), rank}, rank, x, rows.count, depth, sums);
    }
    if (call_.dx) expand<T>(dh_.get(), rank, rows, A_.get(), depth, rank, depth, *call_.dx, 0, dx_.get());
  }

  const GroupedBackwardCall& call_;
  const Group* group_ = nullptr;
  int64_t adapter_ = 0, block_;
  Scratch<float> A_, unpacked_, as_fp32_, dh_;
  Packed B_;
  Scratch<V> dy_, h_, columns_of_h_;
  Scratch<T> dx_;
};

void write_gradients(const GroupedBackwardCall& call, int64_t g, const float* sums, Gradients& out) {
  const Group& group = call.adapters.groups[g];
  const int64_t depth = call.x.columns, probes = call.adapters.probes[g];
  const size_t first = g * group.slots.size();
  for (size_t i = 0; i < group.slots.size(); ++i) {
    const Slot& slot = group.slots[i];
    if (call.need_dB) {
      write_transposed(sums, slot.rank, slot.columns, slot.scale, out.dB[first + i]);
      sums += slot.rank * slot.columns;
    }
    if (call.need_Q) write_transposed(sums, probes, slot.columns, 1.0f, out.Q[first + i]);
    sums += probes * slot.columns;
  }
  for (size_t i = 0; call.need_dA && i < group.slots.size(); ++i) {
    Tensor& to = out.dA[first + i];
    write_as_dtype(sums + group.slots[i].offset * depth, group.slots[i].rank * depth, to);
  }
}

// Zeros where an adapter has no rows; else everything is written later.
Gradients new_gradients(const GroupedBackwardCall& call) {
  Gradients out;
  for (size_t i = 0, count = call.A.size(); i < count; ++i) {
    const int64_t g = static_cast<int64_t>(i * call.segments.adapters / count);
    const bool absent = call.segments.rows[g] == 0;
    const Slot& slot = call.adapters.groups[g].slots[i % call.adapters.groups[g].slots.size()];
    if (call.need_dA) out.dA.push_back(new_tensor({slot.rank, call.x.columns}, call.A[i].scalar_type(), absent));
    if (call.need_dB) out.dB.push_back(new_tensor({slot.columns, slot.rank}, call.B[i].scalar_type(), absent));
    if (call.need_Q) out.Q.push_back(new_tensor({slot.columns, call.adapters.probes[g]}, ScalarType::Float, absent));
  }
  return out;
}

// Sums of adapters whose rows lie in several parts, in the order of the parts.
void add_shared(const GroupedBackwardCall& call, const Schedule& schedule, const std::vector<int64_t>& at,
                float* partial, Gradients& out) {
  for (size_t i = 0; i < schedule.shared.size();) {
    const int64_t g = schedule.shared[i].adapter, count = call.sums(g);
    float* sums = partial + at[i];
    for (++i; i < schedule.shared.size() && schedule.shared[i].adapter == g; ++i) {
      for (int64_t q = 0; q < count; ++q) sums[q] += partial[at[i] + q];
    }
    write_gradients(call, g, sums, out);
  }
}

void run(const GroupedBackwardCall& call, Gradients& out) {
  int64_t widest = call.x.columns;
  for (const Group& group : call.adapters.groups) widest = std::max(widest, group.widest);
  const int64_t block = block_rows(widest);
  std::vector<int64_t> work, at(1, 0);
  for (const Segment& segment : call.segments.present) {
    // The split does not depend on what is asked for, so that neither do the bits of the rest.
    work.push_back(2 * (call.packed(segment.adapter) + call.rank(segment.adapter) * call.x.columns));
  }
  const Schedule schedule(call.segments, work);
  for (const Segment& segment : schedule.shared) at.push_back(at.back() + call.sums(segment.adapter));
  const Scratch<float> partial(at.back());
  const int64_t most = call.largest([&](int64_t g) { return call.sums(g); });
  with_types(call.x.dtype, [&](auto type, auto multiplied) {
    schedule.run([&](const std::vector<Segment>& segments) {
      BackwardPart<decltype(type), decltype(multiplied)> part(call, block, widest);
      const Scratch<float> own(most);
      for (const Segment& segment : segments) {
        float* sums = segment.partial >= 0 ? partial.get() + at[segment.partial] : own.get();
        std::fill_n(sums, call.sums(segment.adapter), 0.0f);
        part.run(segment, sums);
        if (segment.partial < 0) write_gradients(call, segment.adapter, sums, out);
      }
    });
  });
  add_shared(call, schedule, at, partial.get(), out);
}

void check_probes(const std::vector<int64_t>& probes, int64_t adapters) {
  STD_TORCH_CHECK(static_cast<int64_t>(probes.size()) == adapters, "probes has ", probes.size(), " entries for ",
                  adapters, " adapters");
  for (const int64_t count : probes) STD_TORCH_CHECK(count >= 0, "probes has ", count, "; accepted: 0 or more");
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_grouped_backward_(
    std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
    const std::vector<Tensor>& A, const std::vector<Tensor>& B, const Tensor& order, const Tensor& ranges,
    const std::vector<int64_t>& outputs, const std::vector<int64_t>& columns, const std::vector<double>& scales,
    const std::vector<int64_t>& starts, const std::vector<int64_t>& probes, bool need_dA, bool need_dB) {
  GroupedBackwardCall call{read_inputs(x, h, dy, dx), {}, A, B, need_dA, need_dB};
  call.segments = read_segments(order, ranges, call.x.rows);
  check_probes(probes, call.segments.adapters);
  call.need_Q = std::any_of(probes.begin(), probes.end(), [](int64_t count) { return count > 0; });
  call.adapters = read_adapters(A, B, call.segments.adapters, probes, scales, starts,
                                {outputs, columns, call.widths, call.x.columns});
  for (int64_t g = 0; g < call.segments.adapters; ++g) {
    STD_TORCH_CHECK(call.h.columns >= call.adapters.width(g), "h has ", call.h.columns, " columns, but adapter ", g,
                    " has ", call.rank(g), " ranks and ", probes[g], " probes");
  }
  Gradients out = new_gradients(call);
  run(call, out);
  return {std::move(out.dA), std::move(out.dB), std::move(out.Q)};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_grouped_backward_", TORCH_BOX(&fastlora::lora_grouped_backward_));
}

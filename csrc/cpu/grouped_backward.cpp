// The backward of a group with many adapters, each on its own rows, after the frozen matmul has written dy W into dx:
// dh_gi = scale_gi dy_i B_gi    dB_gi = scale_gi dy_i^T h_gi    Q_gi = dy_i^T h_P    dA_g = dh_g^T x    dx += dh_g A_g
#include "cpu/grouped.h"

namespace fastlora {
namespace {

struct Gradients {
  std::vector<Tensor> dA, dB, Q;
};

struct Pass {
  Matrix x, h;
  std::vector<Matrix> dy;
  std::optional<Target> dx;
  Segments segments;
  Adapters adapters;
  const std::vector<Tensor>&A, &B;
  bool need_dA = false, need_dB = false, need_Q = false;

  bool need_dh() const { return need_dA || dx; }
  int64_t met(int64_t g, const Slot& it) const { return (need_dB ? it.rank : 0) + adapters.probes[g]; }
  // Sums of an adapter: dB and Q of every projection, [rank + probes, columns], then dA.
  int64_t sums(int64_t g) const {
    int64_t out = need_dA ? adapters.groups[g].rank * x.columns : 0;
    for (const Slot& it : adapters.groups[g].slots) out += met(g, it) * it.columns;
    return out;
  }
  template <class F>
  int64_t largest(const F& f) const {
    int64_t out = 0;
    for (const Segment& it : segments.present) out = std::max(out, f(it.adapter));
    return out;
  }
};

template <class T>
class Part {
 public:
  Part(const Pass& pass, int64_t block, int64_t widest)
      : pass_(pass),
        block_(block),
        A_(pass.dx ? pass.largest([&](int64_t g) { return rank(g) * pass.x.columns; }) : 0),
        B_(pass.need_dh() ? pass.largest([&](int64_t g) { return pass.adapters.groups[g].packed; }) : 0),
        unpacked_(pass.largest([&](int64_t g) { return pass.adapters.groups[g].packed; })),
        wide_(block * widest),
        h_(block * pass.h.columns),
        met_(block * pass.h.columns),
        dh_(block * pass.largest([&](int64_t g) { return rank(g); })),
        dx_(block * pass.x.columns),
        dy_pairs_(in_pairs<T>() ? block * widest : 0),
        h_pairs_(in_pairs<T>() ? block * pass.h.columns : 0),
        met_pairs_(in_pairs<T>() ? block * pass.h.columns : 0),
        B_pairs_(in_pairs<T>() && pass.need_dh()
                     ? pass.largest([&](int64_t g) { return pass.adapters.groups[g].packed; })
                     : 0) {}

  void run(const Segment& segment, float* sums) {
    adapter_ = segment.adapter;
    group_ = &pass_.adapters.groups[adapter_];
    pack_factors();
    // Projections without a gradient contribute nothing.
    std::fill_n(dh_.get(), block_ * group_->rank, 0.0f);
    for_each_block(pass_.segments.order, segment, block_, [&](const Rows& rows) { run_block(rows, sums); });
  }

  int64_t multiply_adds() const { return multiplier_.done; }

 private:
  int64_t rank(int64_t g) const { return pass_.adapters.groups[g].rank; }

  void pack_factors() {
    const size_t count = group_->slots.size();
    for (size_t i = 0; i < count; ++i) {
      const Slot& it = group_->slots[i];
      const size_t at = adapter_ * count + i;
      if (pass_.dx) pack(pass_.A[at], 1.0f, pass_.x.dtype, A_.get() + it.offset * pass_.x.columns);
      if (!pass_.need_dh() || it.output < 0) continue;
      // The scale is not exact in bf16.
      const float scale = in_pairs<T>() ? 1.0f : it.scale;
      pack_transposed(pass_.B[at], scale, pass_.x.dtype, unpacked_.get(), B_.get() + it.packed);
      if (in_pairs<T>()) {
        kernels().of_bf16.narrow(B_.get() + it.packed, B_pairs_.get() + it.packed, it.rank * it.columns);
      }
    }
  }

  // What dy of one projection meets: its own ranks of h, then the probes, side by side.
  template <class In, class Value>
  In met_by(const Slot& it, const In& h, int64_t rows, Value* scratch) {
    const int64_t probes = pass_.adapters.probes[adapter_], rank = pass_.need_dB ? it.rank : 0;
    if (probes == 0) return {h.data + it.offset, h.stride};
    if (rank == 0) return {h.data + group_->rank, h.stride};
    gather(h.data, h.stride, rows, it.offset, rank, group_->rank, probes, scratch);
    return {scratch, rank + probes};
  }

  // dh, and what dy meets, dB and Q of every projection, on products of bf16 pairs; the end of what it added to.
  float* run_slots_in_pairs(const Rows& rows, float* sums) {
    const int64_t rank = group_->rank, width = pass_.adapters.width(adapter_);
    const TypedRows<bf16> h = typed_rows(pass_.h.data<bf16>(), pass_.h.stride, rows, width, h_pairs_.get());
    for (const Slot& it : group_->slots) {
      const int64_t count = pass_.met(adapter_, it);
      if (it.output >= 0) {
        const Matrix& from = pass_.dy[it.output];
        const TypedRows<bf16> dy =
            typed_rows(from.data<bf16>() + it.column, from.stride, rows, it.columns, dy_pairs_.get());
        if (pass_.need_dh()) {
          float* dh = dh_.get() + it.offset;
          multiplier_.dot(dy, rows.count, B_pairs_.get() + it.packed, it.rank, it.columns, dh, rank);
          for (int64_t row = 0; row < rows.count; ++row, dh += rank) {
            for (int64_t r = 0; r < it.rank; ++r) dh[r] *= it.scale;
          }
        }
        const TypedRows<bf16> met = met_by(it, h, rows.count, met_pairs_.get());
        multiplier_.outer(met.data, met.stride, count, dy, rows.count, it.columns, sums);
      }
      sums += count * it.columns;
    }
    return sums;
  }

  // As run_slots_in_pairs, on fp32 rows.
  float* run_slots(const Rows& rows, float* sums) {
    const int64_t rank = group_->rank, width = pass_.adapters.width(adapter_);
    const FloatRows h = float_rows(pass_.h.data<T>(), pass_.h.stride, rows, width, h_.get());
    for (const Slot& it : group_->slots) {
      const int64_t count = pass_.met(adapter_, it);
      if (it.output >= 0) {
        const Matrix& from = pass_.dy[it.output];
        const FloatRows dy = float_rows(from.data<T>() + it.column, from.stride, rows, it.columns, wide_.get());
        if (pass_.need_dh()) {
          multiplier_.dot(dy, rows.count, B_.get() + it.packed, it.rank, it.columns, dh_.get() + it.offset, rank);
        }
        const FloatRows met = met_by(it, h, rows.count, met_.get());
        multiplier_.outer(met.data, met.stride, count, dy, rows.count, it.columns, sums);
      }
      sums += count * it.columns;
    }
    return sums;
  }

  void run_block(const Rows& rows, float* sums) {
    const int64_t depth = pass_.x.columns, rank = group_->rank;
    sums = in_pairs<T>() ? run_slots_in_pairs(rows, sums) : run_slots(rows, sums);
    if (rank == 0) return;
    if (pass_.need_dA) {
      const FloatRows x = float_rows(pass_.x.data<T>(), pass_.x.stride, rows, depth, wide_.get());
      multiplier_.outer(dh_.get(), rank, rank, x, rows.count, depth, sums);
    }
    if (pass_.dx) multiplier_.expand<T>(dh_.get(), rank, rows, A_.get(), rank, depth, *pass_.dx, 0, dx_.get());
  }

  const Pass& pass_;
  const Group* group_ = nullptr;
  int64_t adapter_ = 0, block_;
  Scratch<float> A_, B_, unpacked_, wide_, h_, met_, dh_;
  Scratch<T> dx_;
  Scratch<bf16> dy_pairs_, h_pairs_, met_pairs_, B_pairs_;
  Multiplier multiplier_;
};

void write_transposed(const float* from, int64_t rank, int64_t columns, float scale, Tensor& to) {
  if (to.scalar_type() == ScalarType::Float) {
    transpose_scaled(from, columns, rank, columns, scale, static_cast<float*>(to.mutable_data_ptr()), rank);
    return;
  }
  const Scratch<float> wide(columns * rank);
  transpose_scaled(from, columns, rank, columns, scale, wide.get(), rank);
  write_as(to.scalar_type(), wide.get(), columns * rank, to);
}

void write_gradients(const Pass& pass, int64_t g, const float* sums, Gradients& out) {
  const Group& group = pass.adapters.groups[g];
  const int64_t depth = pass.x.columns, probes = pass.adapters.probes[g];
  const size_t first = g * group.slots.size();
  for (size_t i = 0; i < group.slots.size(); ++i) {
    const Slot& it = group.slots[i];
    if (pass.need_dB) {
      write_transposed(sums, it.rank, it.columns, it.scale, out.dB[first + i]);
      sums += it.rank * it.columns;
    }
    if (pass.need_Q) write_transposed(sums, probes, it.columns, 1.0f, out.Q[first + i]);
    sums += probes * it.columns;
  }
  for (size_t i = 0; pass.need_dA && i < group.slots.size(); ++i) {
    Tensor& to = out.dA[first + i];
    write_as(to.scalar_type(), sums + group.slots[i].offset * depth, group.slots[i].rank * depth, to);
  }
}

// Zeros where an adapter has no rows; else everything is written later.
Gradients new_gradients(const Pass& pass) {
  Gradients out;
  for (size_t i = 0, count = pass.A.size(); i < count; ++i) {
    const int64_t g = static_cast<int64_t>(i * pass.segments.adapters / count);
    const bool absent = pass.segments.rows[g] == 0;
    const Slot& it = pass.adapters.groups[g].slots[i % pass.adapters.groups[g].slots.size()];
    if (pass.need_dA) out.dA.push_back(new_tensor({it.rank, pass.x.columns}, pass.A[i].scalar_type(), absent));
    if (pass.need_dB) out.dB.push_back(new_tensor({it.columns, it.rank}, pass.B[i].scalar_type(), absent));
    if (pass.need_Q) out.Q.push_back(new_tensor({it.columns, pass.adapters.probes[g]}, ScalarType::Float, absent));
  }
  return out;
}

// Sums of adapters whose rows lie in several parts, in the order of the parts.
void add_shared(const Pass& pass, const Schedule& schedule, const std::vector<int64_t>& at, float* partial,
                Gradients& out) {
  for (size_t i = 0; i < schedule.shared.size();) {
    const int64_t g = schedule.shared[i].adapter, count = pass.sums(g);
    float* sums = partial + at[i];
    for (++i; i < schedule.shared.size() && schedule.shared[i].adapter == g; ++i) {
      for (int64_t q = 0; q < count; ++q) sums[q] += partial[at[i] + q];
    }
    write_gradients(pass, g, sums, out);
  }
}

// Returns the multiply-adds.
int64_t run(const Pass& pass, Gradients& out) {
  int64_t widest = pass.x.columns;
  for (const Group& group : pass.adapters.groups) {
    for (const Slot& it : group.slots) widest = std::max(widest, it.columns);
  }
  const int64_t block = block_rows(widest);
  std::vector<int64_t> work, at(1, 0);
  for (const Segment& it : pass.segments.present) {
    // The split does not depend on what is asked for, so that neither do the bits of the rest.
    work.push_back(2 *
                   (pass.adapters.groups[it.adapter].packed + pass.adapters.groups[it.adapter].rank * pass.x.columns));
  }
  const Schedule schedule(pass.segments, work);
  for (const Segment& it : schedule.shared) at.push_back(at.back() + pass.sums(it.adapter));
  const Scratch<float> partial(at.back());
  const int64_t most = pass.largest([&](int64_t g) { return pass.sums(g); });
  std::vector<int64_t> multiply_adds(schedule.parts.size(), 0);
  with_type(pass.x.dtype, [&](auto type) {
    schedule.run([&](int64_t index, const std::vector<Segment>& segments) {
      Part<decltype(type)> part(pass, block, widest);
      const Scratch<float> own(most);
      for (const Segment& it : segments) {
        float* sums = it.partial >= 0 ? partial.get() + at[it.partial] : own.get();
        std::fill_n(sums, pass.sums(it.adapter), 0.0f);
        part.run(it, sums);
        if (it.partial < 0) write_gradients(pass, it.adapter, sums, out);
      }
      multiply_adds[index] = part.multiply_adds();
    });
  });
  add_shared(pass, schedule, at, partial.get(), out);
  return std::accumulate(multiply_adds.begin(), multiply_adds.end(), int64_t{0});
}

void read_inputs(Pass& pass, const std::vector<Tensor>& dy, const Tensor& h, std::optional<Tensor>& dx) {
  const Matrix& x = pass.x;
  for (const Tensor& grad : dy) {
    pass.dy.push_back(read_matrix(grad, "dy"));
    check_same_dtype(pass.dy.back().dtype, "dy", x.dtype, "x");
    STD_TORCH_CHECK(pass.dy.back().rows == x.rows, "dy has ", pass.dy.back().rows, " rows, but x has ", x.rows);
  }
  pass.h = read_matrix(h, "h");
  check_same_dtype(pass.h.dtype, "h", x.dtype, "x");
  STD_TORCH_CHECK(pass.h.rows == x.rows, "h has ", pass.h.rows, " rows, but x has ", x.rows);
  if (!dx) return;
  pass.dx = write_target(*dx, "dx", x.rows, x.dtype);
  STD_TORCH_CHECK(pass.dx->columns == x.columns, "dx has ", pass.dx->columns, " columns, but x has ", x.columns);
}

void check_probes(const std::vector<int64_t>& probes, int64_t adapters) {
  STD_TORCH_CHECK(static_cast<int64_t>(probes.size()) == adapters, "probes has ", probes.size(), " entries for ",
                  adapters, " adapters");
  for (const int64_t count : probes) STD_TORCH_CHECK(count >= 0, "probes has ", count, "; accepted: 0 or more");
}

std::pair<Gradients, int64_t> backward(std::optional<Tensor>& dx, const std::vector<Tensor>& dy, const Tensor& x,
                                       const Tensor& h, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                                       const Tensor& order, const Tensor& ranges, const std::vector<int64_t>& outputs,
                                       const std::vector<int64_t>& columns, const std::vector<double>& scales,
                                       const std::vector<int64_t>& starts, const std::vector<int64_t>& probes,
                                       bool need_dA, bool need_dB) {
  Pass pass{read_matrix(x, "x"), {}, {}, std::nullopt, {}, {}, A, B, need_dA, need_dB};
  read_inputs(pass, dy, h, dx);
  std::vector<int64_t> widths;
  for (const Matrix& grad : pass.dy) widths.push_back(grad.columns);
  pass.segments = read_segments(order, ranges, pass.x.rows);
  check_probes(probes, pass.segments.adapters);
  pass.need_Q = std::any_of(probes.begin(), probes.end(), [](int64_t count) { return count > 0; });
  pass.adapters =
      read_adapters(A, B, pass.segments.adapters, probes, scales, starts, {outputs, columns, widths, pass.x.columns});
  for (int64_t g = 0; g < pass.segments.adapters; ++g) {
    STD_TORCH_CHECK(pass.h.columns >= pass.adapters.width(g), "h has ", pass.h.columns, " columns, but adapter ", g,
                    " has ", pass.adapters.groups[g].rank, " ranks and ", probes[g], " probes");
  }
  Gradients out = new_gradients(pass);
  const int64_t multiply_adds = run(pass, out);
  return {std::move(out), multiply_adds};
}

using Result = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

Result lora_grouped_backward_(std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                              const std::vector<Tensor>& A, const std::vector<Tensor>& B, const Tensor& order,
                              const Tensor& ranges, const std::vector<int64_t>& outputs,
                              const std::vector<int64_t>& columns, const std::vector<double>& scales,
                              const std::vector<int64_t>& starts, const std::vector<int64_t>& probes, bool need_dA,
                              bool need_dB) {
  Gradients out =
      backward(dx, dy, x, h, A, B, order, ranges, outputs, columns, scales, starts, probes, need_dA, need_dB).first;
  return {std::move(out.dA), std::move(out.dB), std::move(out.Q)};
}

// The same pass, for the multiply-adds that its kernels were asked for.
int64_t grouped_backward_multiply_adds_(std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x,
                                        const Tensor& h, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                                        const Tensor& order, const Tensor& ranges, const std::vector<int64_t>& outputs,
                                        const std::vector<int64_t>& columns, const std::vector<double>& scales,
                                        const std::vector<int64_t>& starts, const std::vector<int64_t>& probes,
                                        bool need_dA, bool need_dB) {
  return backward(dx, dy, x, h, A, B, order, ranges, outputs, columns, scales, starts, probes, need_dA, need_dB).second;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_grouped_backward_", TORCH_BOX(&fastlora::lora_grouped_backward_));
  m.impl("grouped_backward_multiply_adds_", TORCH_BOX(&fastlora::grouped_backward_multiply_adds_));
}

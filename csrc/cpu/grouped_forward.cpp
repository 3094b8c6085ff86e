// The forward of many adapters, each on its own rows of the batch, in one pass after the frozen matmul has written y:
// lora_grouped_forward_.
#include "cpu/grouped.h"

namespace fastlora {
namespace {

struct GroupedForwardCall : ForwardOperands, GroupedCall {
  const std::vector<Tensor>&A, &P, &B;
  int64_t width = 0;  // columns of h
  void* h = nullptr;
};

// One thread's share of the rows, which are of type T and multiplied as V.
template <class T, class V>
class ForwardPart {
 public:
  ForwardPart(const GroupedForwardCall& call, int64_t block, int64_t widest)
      : call_(call),
        block_(block),
        A_(call.largest([&](int64_t g) { return call.adapters.width(g) * call.x.columns; }), std::is_same_v<V, bf16>),
        B_(call.largest([&](int64_t g) { return call.packed(g); })),
        unpacked_(call.largest([&](int64_t g) { return call.packed(g); })),
        s_(block * call.width),
        y_(block * widest),
        x_(block * call.x.columns) {}

  void run(const Segment& segment, double* sums) {
    group_ = &call_.adapters.groups[segment.adapter];
    width_ = call_.adapters.width(segment.adapter);
    pack_factors(segment.adapter);
    for_each_block(call_.segments.order, segment, block_, [&](const Rows& rows) { run_block(rows, sums); });
  }

 private:
  void pack_factors(int64_t g) {
    const int64_t depth = call_.x.columns;
    const size_t count = group_->slots.size();
    for (size_t i = 0; i < count; ++i) {
      const Slot& slot = group_->slots[i];
      pack(call_.A[g * count + i], call_.x.dtype, A_.fp32.get() + slot.offset * depth);
      pack_transposed(call_.B[g * count + i], slot.scale, call_.x.dtype, unpacked_.get(), B_.get() + slot.packed);
    }
    if (width_ > group_->rank) pack(call_.P[g], call_.x.dtype, A_.fp32.get() + group_->rank * depth);
    A_.write_pairs(0, width_ * depth);
  }

  void run_block(const Rows& rows, double* sums) {
    const int64_t depth = call_.x.columns;
    const RowsOf<V> x = rows_as(call_.x.row<T>(0), call_.x.stride, rows, depth, x_.get());
    dot(x, rows.count, {A_.as<V>(), depth}, width_, depth, s_.get(), width_);
    T* h = static_cast<T*>(call_.h);
    for (int64_t i = 0; i < rows.count; ++i) {
      T* to = h + rows.at(i) * call_.width;
      kernels().of<T>().narrow(s_.get() + i * width_, to, width_);
      std::fill_n(to + width_, call_.width - width_, T{});
    }
    for (const Slot& slot : group_->slots) {
      slot.each_block([&](int64_t n, int64_t at, int64_t count) {
        expand<T>(s_.get() + slot.offset, width_, rows, B_.get() + slot.packed + n, slot.columns, slot.rank, count,
                  call_.y[slot.output], at, y_.get());
      });
    }
    for (size_t j = 0; sums && j < call_.y.size(); ++j) {
      const int64_t columns = call_.y[j].columns;
      const auto [y, stride] = rows_as(call_.y[j].row<T>(0), call_.y[j].stride, rows, columns, y_.get());
      double* to = sums + call_.first[j];
      kernels().of<T>().moments(y, stride, rows.count, columns, to, to + columns);
    }
  }

  const GroupedForwardCall& call_;
  const Group* group_ = nullptr;
  int64_t block_, width_ = 0;
  Packed A_;
  Scratch<float> B_, unpacked_, s_;
  Scratch<T> y_;
  Scratch<V> x_;
};

// Sums of an adapter are laid out as [2, N_j] for each y_j.
void write_moments(const GroupedForwardCall& call, int64_t g, const double* sums, std::vector<Tensor>& moments) {
  for (size_t j = 0; j < call.y.size(); ++j) {
    double* to = static_cast<double*>(moments[g * call.y.size() + j].mutable_data_ptr());
    const double* from = sums + call.first[j];
    for (int64_t i = 0; i < 2 * call.y[j].columns; ++i) to[i] += from[i];
  }
}

void run(const GroupedForwardCall& call, std::vector<Tensor>& moments) {
  int64_t widest = 0;
  for (const int64_t width : call.widths) widest = std::max(widest, width);
  const int64_t block = block_rows(std::max(widest, call.x.columns));
  std::vector<int64_t> work;
  for (const Segment& segment : call.segments.present) {
    // The split does not depend on what is asked for, so that neither do the bits of the rest.
    work.push_back(call.packed(segment.adapter) + call.rank(segment.adapter) * call.x.columns);
  }
  const Schedule schedule(call.segments, work);
  const Scratch<double> partial(call.sums * static_cast<int64_t>(schedule.shared.size()));
  with_types(call.x.dtype, [&](auto type, auto multiplied) {
    schedule.run([&](const std::vector<Segment>& segments) {
      ForwardPart<decltype(type), decltype(multiplied)> part(call, block, widest);
      const Scratch<double> own(call.sums);
      for (const Segment& segment : segments) {
        double* sums = segment.partial >= 0 ? partial.get() + segment.partial * call.sums : own.get();
        std::fill_n(sums, call.sums, 0.0);
        part.run(segment, call.sums ? sums : nullptr);
        if (call.sums && segment.partial < 0) write_moments(call, segment.adapter, sums, moments);
      }
    });
  });
  for (const Segment& segment : schedule.shared) {
    if (call.sums) write_moments(call, segment.adapter, partial.get() + segment.partial * call.sums, moments);
  }
}

std::vector<int64_t> read_probes(const std::vector<Tensor>& P, int64_t adapters, int64_t depth) {
  STD_TORCH_CHECK(P.empty() || static_cast<int64_t>(P.size()) == adapters, "P has ", P.size(),
                  " entries; accepted: 0, or one for each of the ", adapters, " adapters");
  std::vector<int64_t> probes(adapters, 0);
  for (size_t g = 0; g < P.size(); ++g) {
    check_operand(P[g], "P");
    STD_TORCH_CHECK(P[g].size(1) == depth, "P has ", P[g].size(1), " columns, but x has ", depth, " (in_features)");
    probes[g] = P[g].size(0);
  }
  return probes;
}

std::tuple<Tensor, std::vector<Tensor>> lora_grouped_forward_(
    std::vector<Tensor> y, const Tensor& x_, const std::vector<Tensor>& A, const std::vector<Tensor>& P,
    const std::vector<Tensor>& B, const Tensor& order, const Tensor& ranges, const std::vector<int64_t>& outputs,
    const std::vector<int64_t>& columns, const std::vector<double>& scales, const std::vector<int64_t>& starts,
    bool need_moments) {
  GroupedForwardCall call{read_forward(x_, y, outputs, need_moments), {}, A, P, B};
  const Matrix& x = call.x;
  call.segments = read_segments(order, ranges, x.rows);
  const int64_t adapters = call.segments.adapters;
  call.adapters = read_adapters(A, B, adapters, read_probes(P, adapters, x.columns), scales, starts,
                                {outputs, columns, call.widths, x.columns});
  for (int64_t g = 0; g < adapters; ++g) call.width = std::max(call.width, call.adapters.width(g));
  // Base-only rows are zero; the others are written in full.
  Tensor h = new_tensor({x.rows, call.width}, x.dtype, call.segments.covered < x.rows);
  call.h = h.mutable_data_ptr();
  std::vector<Tensor> moments;
  for (size_t i = 0; need_moments && i < adapters * y.size(); ++i) {
    moments.push_back(new_tensor({2, call.widths[i % y.size()]}, ScalarType::Double, true));
  }
  run(call, moments);
  return {h, moments};
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_grouped_forward_", TORCH_BOX(&fastlora::lora_grouped_forward_));
}

// The forward of a group with many adapters, each on its own rows of the batch, after the frozen matmul:
// h = x [A_g; P_g]^T, then y_j[:, columns_i] += scale_gi h_gi B_gi^T in place, and the column moments of y per adapter
#include "cpu/grouped.h"

namespace fastlora {
namespace {

struct Pass {
  Matrix x;
  std::vector<Target> y;
  Segments segments;
  Adapters adapters;
  const std::vector<Tensor>&A, &P, &B;
  int64_t width = 0;           // columns of h
  std::vector<int64_t> first;  // of the moments of y_j in the sums of an adapter
  int64_t sums = 0;            // doubles that an adapter adds up; 0 without moments
  void* h = nullptr;

  // The largest of something over the adapters with rows.
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
        A_(pass.largest([&](int64_t g) { return pass.adapters.width(g) * pass.x.columns; })),
        B_(pass.largest([&](int64_t g) { return pass.adapters.groups[g].packed; })),
        unpacked_(pass.largest([&](int64_t g) { return pass.adapters.groups[g].packed; })),
        wide_(in_pairs<T>() ? 0 : block * pass.x.columns),
        s_(block * pass.width),
        y_(block * widest),
        x_(in_pairs<T>() ? block * pass.x.columns : 0),
        A_pairs_(in_pairs<T>() ? pass.largest([&](int64_t g) { return pass.adapters.width(g) * pass.x.columns; }) : 0) {
  }

  void run(const Segment& segment, double* sums) {
    group_ = &pass_.adapters.groups[segment.adapter];
    width_ = pass_.adapters.width(segment.adapter);
    pack_factors(segment.adapter);
    for_each_block(pass_.segments.order, segment, block_, [&](const Rows& rows) { run_block(rows, sums); });
  }

  int64_t multiply_adds() const { return multiplier_.done; }

 private:
  void pack_factors(int64_t g) {
    const int64_t depth = pass_.x.columns;
    const size_t count = group_->slots.size();
    for (size_t i = 0; i < count; ++i) {
      const Slot& it = group_->slots[i];
      pack(pass_.A[g * count + i], 1.0f, pass_.x.dtype, A_.get() + it.offset * depth);
      pack_transposed(pass_.B[g * count + i], it.scale, pass_.x.dtype, unpacked_.get(), B_.get() + it.packed);
    }
    if (width_ > group_->rank) pack(pass_.P[g], 1.0f, pass_.x.dtype, A_.get() + group_->rank * depth);
    if (in_pairs<T>()) kernels().of_bf16.narrow(A_.get(), A_pairs_.get(), width_ * depth);
  }

  // s = x [A; P]^T in fp32
  void shrink(const Rows& rows) {
    const int64_t depth = pass_.x.columns;
    if constexpr (std::is_same_v<T, bf16>) {
      if (in_pairs<T>()) {
        const TypedRows<T> x = typed_rows(pass_.x.data<T>(), pass_.x.stride, rows, depth, x_.get());
        multiplier_.dot(x, rows.count, A_pairs_.get(), width_, depth, s_.get(), width_);
        return;
      }
    }
    const FloatRows x = float_rows(pass_.x.data<T>(), pass_.x.stride, rows, depth, wide_.get());
    multiplier_.dot(x, rows.count, A_.get(), width_, depth, s_.get(), width_);
  }

  void run_block(const Rows& rows, double* sums) {
    shrink(rows);
    T* h = static_cast<T*>(pass_.h);
    for (int64_t i = 0; i < rows.count; ++i) {
      T* to = h + rows.at(i) * pass_.width;
      kernels().of<T>().narrow(s_.get() + i * width_, to, width_);
      std::fill_n(to + width_, pass_.width - width_, T{});
    }
    for (const Slot& it : group_->slots) {
      multiplier_.expand<T>(s_.get() + it.offset, width_, rows, B_.get() + it.packed, it.rank, it.columns,
                            pass_.y[it.output], it.column, y_.get());
    }
    for (size_t j = 0; sums && j < pass_.y.size(); ++j) {
      const int64_t columns = pass_.y[j].columns;
      const auto [y, stride] = typed_rows<T>(pass_.y[j].row<T>(0), pass_.y[j].stride, rows, columns, y_.get());
      double* to = sums + pass_.first[j];
      kernels().of<T>().moments(y, stride, rows.count, columns, to, to + columns);
    }
  }

  const Pass& pass_;
  const Group* group_ = nullptr;
  int64_t block_, width_ = 0;
  Scratch<float> A_, B_, unpacked_, wide_, s_;
  Scratch<T> y_, x_;
  Scratch<bf16> A_pairs_;
  Multiplier multiplier_;
};

// Sums of an adapter are laid out as [2, N_j] for each y_j.
void write_moments(const Pass& pass, int64_t g, const double* sums, std::vector<Tensor>& moments) {
  for (size_t j = 0; j < pass.y.size(); ++j) {
    double* to = static_cast<double*>(moments[g * pass.y.size() + j].mutable_data_ptr());
    const double* from = sums + pass.first[j];
    for (int64_t i = 0; i < 2 * pass.y[j].columns; ++i) to[i] += from[i];
  }
}

// Returns the multiply-adds.
int64_t run(const Pass& pass, std::vector<Tensor>& moments) {
  int64_t widest = 0;
  for (const Target& y : pass.y) widest = std::max(widest, y.columns);
  const int64_t block = block_rows(std::max(widest, pass.x.columns));
  std::vector<int64_t> work;
  for (const Segment& it : pass.segments.present) {
    // The split does not depend on what is asked for, so that neither do the bits of the rest.
    work.push_back(pass.adapters.groups[it.adapter].packed + pass.adapters.groups[it.adapter].rank * pass.x.columns);
  }
  const Schedule schedule(pass.segments, work);
  const Scratch<double> partial(pass.sums * static_cast<int64_t>(schedule.shared.size()));
  std::vector<int64_t> multiply_adds(schedule.parts.size(), 0);
  with_type(pass.x.dtype, [&](auto type) {
    schedule.run([&](int64_t index, const std::vector<Segment>& segments) {
      Part<decltype(type)> part(pass, block, widest);
      const Scratch<double> own(pass.sums);
      for (const Segment& it : segments) {
        double* sums = it.partial >= 0 ? partial.get() + it.partial * pass.sums : own.get();
        std::fill_n(sums, pass.sums, 0.0);
        part.run(it, pass.sums ? sums : nullptr);
        if (pass.sums && it.partial < 0) write_moments(pass, it.adapter, sums, moments);
      }
      multiply_adds[index] = part.multiply_adds();
    });
  });
  for (const Segment& it : schedule.shared) {
    if (pass.sums) write_moments(pass, it.adapter, partial.get() + it.partial * pass.sums, moments);
  }
  return std::accumulate(multiply_adds.begin(), multiply_adds.end(), int64_t{0});
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

using Result = std::tuple<Tensor, std::vector<Tensor>>;

std::pair<Result, int64_t> forward(std::vector<Tensor>& y, const Tensor& x_, const std::vector<Tensor>& A,
                                   const std::vector<Tensor>& P, const std::vector<Tensor>& B, const Tensor& order,
                                   const Tensor& ranges, const std::vector<int64_t>& outputs,
                                   const std::vector<int64_t>& columns, const std::vector<double>& scales,
                                   const std::vector<int64_t>& starts, bool need_moments) {
  Pass pass{read_matrix(x_, "x"), {}, {}, {}, A, P, B, 0, {}};
  const Matrix& x = pass.x;
  std::vector<int64_t> widths;
  for (Tensor& target : y) {
    pass.y.push_back(write_target(target, "y", x.rows, x.dtype));
    widths.push_back(pass.y.back().columns);
    pass.first.push_back(pass.sums);
    if (need_moments) pass.sums += 2 * widths.back();
  }
  for (const int64_t output : outputs) STD_TORCH_CHECK(output >= 0, "outputs: -1 is for the backward only");
  pass.segments = read_segments(order, ranges, x.rows);
  const int64_t adapters = pass.segments.adapters;
  pass.adapters = read_adapters(A, B, adapters, read_probes(P, adapters, x.columns), scales, starts,
                                {outputs, columns, widths, x.columns});
  for (int64_t g = 0; g < adapters; ++g) pass.width = std::max(pass.width, pass.adapters.width(g));
  // Base-only rows are zero; the others are written in full.
  Tensor h = new_tensor({x.rows, pass.width}, x.dtype, pass.segments.covered < x.rows);
  pass.h = h.mutable_data_ptr();
  std::vector<Tensor> moments;
  for (size_t i = 0; need_moments && i < adapters * y.size(); ++i) {
    moments.push_back(new_tensor({2, widths[i % y.size()]}, ScalarType::Double, true));
  }
  const int64_t multiply_adds = run(pass, moments);
  return {{h, moments}, multiply_adds};
}

Result lora_grouped_forward_(std::vector<Tensor> y, const Tensor& x, const std::vector<Tensor>& A,
                             const std::vector<Tensor>& P, const std::vector<Tensor>& B, const Tensor& order,
                             const Tensor& ranges, const std::vector<int64_t>& outputs,
                             const std::vector<int64_t>& columns, const std::vector<double>& scales,
                             const std::vector<int64_t>& starts, bool moments) {
  return forward(y, x, A, P, B, order, ranges, outputs, columns, scales, starts, moments).first;
}

// The same pass, for the multiply-adds that its kernels were asked for.
int64_t grouped_forward_multiply_adds_(std::vector<Tensor> y, const Tensor& x, const std::vector<Tensor>& A,
                                       const std::vector<Tensor>& P, const std::vector<Tensor>& B, const Tensor& order,
                                       const Tensor& ranges, const std::vector<int64_t>& outputs,
                                       const std::vector<int64_t>& columns, const std::vector<double>& scales,
                                       const std::vector<int64_t>& starts, bool moments) {
  return forward(y, x, A, P, B, order, ranges, outputs, columns, scales, starts, moments).second;
}

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_grouped_forward_", TORCH_BOX(&fastlora::lora_grouped_forward_));
  m.impl("grouped_forward_multiply_adds_", TORCH_BOX(&fastlora::grouped_forward_multiply_adds_));
}

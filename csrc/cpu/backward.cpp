// The backward of one adapter in one pass over row blocks, after the frozen matmul has written dx: lora_backward_.
#include "cpu/backward.h"

#include "cpu/fused.h"
#include "cpu/masks.h"

namespace fastlora {
namespace {

// dA and dx of a block of rows of type T whose projections saw the x of their own masks.
template <class T>
class KeptRows {
 public:
  KeptRows(const BackwardCall& call, const Masks& masks, int64_t block)
      : call_(call),
        masks_(masks),
        bits_(masks ? block * masks.words * static_cast<int64_t>(call.group.slots.size()) : 0),
        as_fp32_(masks && call.need_dA ? scratch_for<float, T>(block * call.x.columns) : 0),
        x_(masks && call.need_dA ? block * call.x.columns : 0) {}

  // dh is of the x that was kept, and takes its scale here.
  void run(int64_t m, int64_t rows, float* dh, float* sums) {
    const int64_t depth = call_.x.columns, rank = call_.group.rank;
    scale_kept(masks_, dh, rank, rows, rank);
    parts_.clear();
    RowsOf<float> x{};
    if (call_.need_dA) x = rows_as(call_.x.row<T>(m), call_.x.stride, rows, depth, as_fp32_.get());
    for (size_t i = 0; i < call_.group.slots.size(); ++i) {
      const Slot& slot = call_.group.slots[i];
      if (slot.output < 0 || slot.rank == 0) continue;
      uint32_t* bits = bits_.get() + static_cast<int64_t>(parts_.size()) * rows * masks_.words;
      masks_.write(i, m, rows, bits);
      parts_.push_back({bits, masks_.words, slot.offset, slot.rank});
      if (!call_.need_dA) continue;
      keep_rows(masks_, x.data, x.stride, rows, bits, x_.get());
      add_outer({dh + slot.offset, rank}, slot.rank, {x_.get(), depth}, rows, depth,
                sums + call_.first_dA + slot.offset * depth);
    }
    if (!call_.dx) return;
    kernels().of<T>().expand_kept(dh, rank, rows, call_.A.fp32.get(), depth, parts_.data(),
                                  static_cast<int64_t>(parts_.size()), depth, call_.dx->row<T>(m), call_.dx->stride);
  }

 private:
  const BackwardCall& call_;
  const Masks& masks_;
  const Scratch<uint32_t> bits_;
  const Scratch<float> as_fp32_, x_;
  std::vector<Kept> parts_;
};

template <class T, class V>
void run_rows(const BackwardCall& call, const Masks& masks, int64_t begin, int64_t end, int64_t block, float* sums) {
  const int64_t depth = call.x.columns, rank = call.group.rank;
  KeptRows<T> kept(call, masks, block);
  const BackwardScratch<T, V> scratch(call, block);
  const Scratch<float> dh(block * rank);
  // Projections without a gradient contribute nothing.
  std::fill_n(dh.get(), block * rank, 0.0f);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    run_slots<T, V>(call, m, rows, scratch, dh.get(), sums);
    if (rank == 0) continue;
    if (masks) {
      kept.run(m, rows, dh.get(), sums);
      continue;
    }
    if (call.need_dA) add_dA<T>(call, m, rows, scratch.as_fp32.get(), dh.get(), sums);
    if (call.dx) {
      kernels().of<T>().expand(dh.get(), rank, rows, call.A.fp32.get(), depth, rank, depth, call.dx->row<T>(m),
                               call.dx->stride);
    }
  }
}

void run(const BackwardCall& call, const Masks& masks, float* sums) {
  const int64_t block = block_rows(call.widest());
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(call.x.rows, 2 * (call.group.packed + call.group.rank * call.x.columns));
  parts.sum(sums, call.sums, [&](int64_t begin, int64_t end, float* of_part) {
    with_types(call.x.dtype, [&](auto type, auto multiplied) {
      run_rows<decltype(type), decltype(multiplied)>(call, masks, begin, end, block, of_part);
    });
  });
}

Gradients collect(const BackwardCall& call, const float* sums, const std::vector<Tensor>& A,
                  const std::vector<Tensor>& B) {
  std::vector<Tensor> dA, dB, Q;
  const int64_t depth = call.x.columns;
  for (size_t i = 0; i < A.size(); ++i) {
    const Slot& slot = call.group.slots[i];
    const float* gradient = sums + call.gradient[i];
    if (call.need_dA) {
      dA.push_back(new_tensor({slot.rank, depth}, A[i].scalar_type()));
      write_as_dtype(sums + call.first_dA + slot.offset * depth, slot.rank * depth, dA.back());
    }
    if (call.need_dB) {
      dB.push_back(new_tensor({slot.columns, slot.rank}, B[i].scalar_type()));
      write_transposed(gradient, slot.rank, slot.columns, slot.scale, dB.back());
      gradient += slot.rank * slot.columns;
    }
    if (call.probes > 0) {
      Q.push_back(new_tensor({slot.columns, call.probes}, ScalarType::Float));
      write_transposed(gradient, call.probes, slot.columns, 1.0f, Q.back());
    }
  }
  return {dA, dB, Q};
}

}  // namespace

Gradients lora_backward_(std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                         const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                         const std::vector<int64_t>& outputs, const std::vector<int64_t>& columns,
                         const std::vector<double>& scales, int64_t probes, bool need_dA, bool need_dB,
                         const std::optional<Tensor>& seed, double p, const std::vector<int64_t>& streams) {
  BackwardCall call{read_inputs(x, h, dy, dx), {}, {}, {}, probes};
  call.need_dA = need_dA, call.need_dB = need_dB;
  call.group = read_group(A, B, scales, {outputs, columns, call.widths, call.x.columns});
  check_not_negative(probes, "probes");
  STD_TORCH_CHECK(call.h.columns >= call.group.rank + probes, "h has ", call.h.columns, " columns; rank + probes is ",
                  call.group.rank + probes);
  const Masks masks = read_masks(seed, p, streams, A.size(), call.x.columns);
  call.place_sums();
  const ScalarType dtype = call.x.dtype;
  call.B = pack_B(call.group, B, dtype, in_pairs(dtype));
  if (call.dx) call.A = pack_A(call.group, A, std::nullopt, call.x.columns, dtype, false);
  const Scratch<float> sums(call.sums);
  run(call, masks, sums.get());
  return collect(call, sums.get(), A, B);
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("lora_backward_", TORCH_BOX(&fastlora::lora_backward_)); }

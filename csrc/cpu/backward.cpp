// The backward of one adapter in one pass over row blocks, after the frozen matmul has written dx: lora_backward_.
#include "cpu/backward.h"

#include "cpu/fused.h"

namespace fastlora {
namespace {

template <class T, class V>
void run_rows(const BackwardCall& call, int64_t begin, int64_t end, int64_t block, float* sums) {
  const int64_t depth = call.x.columns, rank = call.group.rank;
  const BackwardScratch<T, V> scratch(call, block);
  const Scratch<float> dh(block * rank);
  // Projections without a gradient contribute nothing.
  std::fill_n(dh.get(), block * rank, 0.0f);
  for (int64_t m = begin; m < end; m += block) {
    const int64_t rows = std::min(block, end - m);
    run_slots<T, V>(call, m, rows, scratch, dh.get(), sums);
    if (rank == 0) continue;
    if (call.need_dA) add_dA<T>(call, m, rows, scratch.as_fp32.get(), dh.get(), sums);
    if (call.dx) {
      kernels().of<T>().expand(dh.get(), rank, rows, call.A.fp32.get(), depth, rank, depth, call.dx->row<T>(m),
                               call.dx->stride);
    }
  }
}

void run(const BackwardCall& call, float* sums) {
  const int64_t block = block_rows(call.widest());
  // The split does not depend on what is asked for, so that neither do the bits of the rest.
  const Parts parts(call.x.rows, 2 * (call.group.packed + call.group.rank * call.x.columns));
  parts.sum(sums, call.sums, [&](int64_t begin, int64_t end, float* of_part) {
    with_types(call.x.dtype, [&](auto type, auto multiplied) {
      run_rows<decltype(type), decltype(multiplied)>(call, begin, end, block, of_part);
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
                         const std::vector<double>& scales, int64_t probes, bool need_dA, bool need_dB) {
  BackwardCall call{read_inputs(x, h, dy, dx), {}, {}, {}, probes};
  call.need_dA = need_dA, call.need_dB = need_dB;
  call.group = read_group(A, B, scales, {outputs, columns, call.widths, call.x.columns});
  check_not_negative(probes, "probes");
  STD_TORCH_CHECK(call.h.columns >= call.group.rank + probes, "h has ", call.h.columns, " columns; rank + probes is ",
                  call.group.rank + probes);
  call.place_sums();
  const ScalarType dtype = call.x.dtype;
  call.B = pack_B(call.group, B, dtype, in_pairs(dtype));
  if (call.dx) call.A = pack_A(call.group, A, std::nullopt, call.x.columns, dtype, false);
  const Scratch<float> sums(call.sums);
  run(call, sums.get());
  return collect(call, sums.get(), A, B);
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("lora_backward_", TORCH_BOX(&fastlora::lora_backward_)); }

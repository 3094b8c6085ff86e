// Schemas of the low-level operators. The maths lives in csrc/cpu and csrc/cuda.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlora, m) {
  m.def(
      "lora_forward_(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor? P, Tensor[] B, int[] outputs, int[] columns, "
      "float[] scales, bool moments) -> (Tensor h, Tensor[] moments)");
  m.def(
      "lora_backward_(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor h, Tensor[] A, Tensor[] B, int[] outputs, "
      "int[] columns, float[] scales, int probes, bool need_dA, bool need_dB) -> (Tensor[] dA, Tensor[] dB, Tensor[] "
      "Q)");
  m.def(
      "lora_grouped_forward_(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor[] P, Tensor[] B, Tensor order, Tensor "
      "ranges, int[] outputs, int[] columns, float[] scales, int[] starts, bool moments) -> (Tensor h, Tensor[] "
      "moments)");
  m.def(
      "lora_grouped_backward_(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor h, Tensor[] A, Tensor[] B, Tensor order, "
      "Tensor ranges, int[] outputs, int[] columns, float[] scales, int[] starts, int[] probes, bool need_dA, bool "
      "need_dB) -> "
      "(Tensor[] dA, Tensor[] dB, Tensor[] Q)");
  m.def(
      "grouped_forward_multiply_adds_(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor[] P, Tensor[] B, Tensor order, "
      "Tensor ranges, int[] outputs, int[] columns, float[] scales, int[] starts, bool moments) -> int");
  m.def(
      "grouped_backward_multiply_adds_(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor h, Tensor[] A, Tensor[] B, Tensor "
      "order, Tensor ranges, int[] outputs, int[] columns, float[] scales, int[] starts, int[] probes, bool need_dA, "
      "bool need_dB) "
      "-> int");
  m.def("shrink(Tensor x, Tensor A) -> Tensor");
  m.def(
      "expand_(Tensor(a!) y, Tensor h, Tensor[] factors, int[] offsets, int[] columns, float[] scales, "
      "bool moments) -> Tensor");
  m.def(
      "wgrad(Tensor x, Tensor[] dy, Tensor h, Tensor[] B, int[] offsets, float[] scales, int rank, int probes, "
      "bool need_dA) -> (Tensor dh, Tensor dA, Tensor[] dB, Tensor[] Q)");
  m.def("outer(Tensor d, Tensor x) -> Tensor");
  m.def("dropout(Tensor x, Tensor seed, int projection, float p) -> Tensor");
  m.def("dropout_rows(Tensor x, Tensor keys, int projection, float p) -> Tensor");
  m.def("philox_signs_(Tensor(a!) out, Tensor seed, int step, int first, int tag, int[] counts) -> ()");
  m.def("add_norms_(Tensor(a!) sums, Tensor tile) -> ()");
  m.def("build_segments(Tensor ids, int adapters) -> (Tensor order, Tensor ranges)");
  m.def("segment_tiles(Tensor ranges, int rows, int block) -> Tensor");
  m.def("penalty(Tensor[] A, Tensor[] B, float[] scales, Tensor weights) -> Tensor");
  m.def(
      "penalty_grad_(Tensor(a!)[] dA, Tensor(b!)[] dB, Tensor[] A, Tensor[] B, float[] scales, Tensor weights, "
      "float weight) -> ()");
  m.def("squared_norms(Tensor[] tensors) -> Tensor");
  m.def("output_variances(Tensor[] moments, int[] runs, int[] sizes) -> Tensor");
  m.def("resize_ranks_(Tensor(a!)[] to, Tensor[] source) -> ()");
  m.def("cpu_isa() -> str");
  m.def("open_plans(int registry, str driver) -> str");
  m.def("keep_plan(int cache, int variant, int plan, Tensor[] inputs, Tensor[] constants) -> ()");
  m.def("run_plan(int cache, int variant, Tensor[] inputs) -> Tensor[]");
}

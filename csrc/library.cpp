// Schemas of the low-level operators; the maths lives in csrc/cpu and csrc/cuda.
//
// M rows (tokens), K = in_features, N_j columns of the matrix y_j. Projection i has the factors A_i [r_i, K] and
// B_i [n_i, r_i], and lies in columns columns[i]..columns[i] + n_i of y_j, j = outputs[i]. R = sum_i r_i. Where
// projections interleave `columns` goes on with a block b_i and a stride s_i of each, all first columns, then all
// blocks, then all strides: column n of projection i is column columns[i] + n / b_i * s_i + n % b_i of y_j. Unless said
// otherwise:
// - matrices are float32, bfloat16 or float16 of any strides; those written in place, (a!), have column stride 1;
// - every size may be 0, a rank too, and a list empty;
// - products are summed in fp32 and rounded once to the dtype of the result. Sums over rows go block by block, then
//   over the parts of the threads in their order: for the same shapes and number of threads they repeat bit by bit;
// - nothing has been written when an argument is refused.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlora, m) {
  // h = x [A_0; A_1; ...; P]^T   [M, R + k], dtype of x
  // y_j[:, columns_i] += scale_i h_i B_i^T   with h_i before it is rounded
  // moments_j = [sum_m y_j; sum_m y_j^2]   [2, N_j] float64, of y_j after the update; none without `moments`
  // P is [k, K], or int64 [projections, k] and contiguous: its rows are then unit vectors by number, which make
  // projections * k columns of h. Factors and P in another dtype than x and y are first rounded to that.
  // With a seed, int64 scalar, projection i sees dropout(x, seed, streams[i], p) instead of x; the probes see x.
  m.def(
      "lora_forward_(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor? P, Tensor[] B, int[] outputs, int[] columns, "
      "float[] scales, bool moments, Tensor? seed=None, float p=0, int[] streams=[]) -> (Tensor h, Tensor[] moments)");
  // dh_i = scale_i dy_i B_i   in fp32, not rounded
  // dx += dh A   [M, K], where it is given
  // dA_i = dh_i^T x   [r_i, K], dtype of A_i; none without `need_dA`
  // dB_i = scale_i dy_i^T h_i   [n_i, r_i], dtype of B_i; none without `need_dB`
  // Q_i = dy_i^T h_P   [n_i, probes] float32; none without probes
  // dy_i are the columns of projection i in dy_j; h_P the `probes` columns of h after the ranks, or, where h has
  // R + projections * probes columns, those of projection i. outputs[i] = -1: projection i has no gradient, its dA, dB
  // and Q are zero and dx gets nothing of it. With the seed of the forward, dA_i is of the x that projection i saw, and
  // dh_i A_i is dropped as that was.
  m.def(
      "lora_backward_(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor h, Tensor[] A, Tensor[] B, int[] outputs, "
      "int[] columns, float[] scales, int probes, bool need_dA, bool need_dB, Tensor? seed=None, float p=0, int[] "
      "streams=[]) -> (Tensor[] dA, Tensor[] dB, Tensor[] Q)");
  // Both directions of a group whose frozen products are the library's matmul, in one call each:
  // [*y, h, *moments]   y_j = x W_j^T + bias_j   [*, N_j], then lora_forward_; moments_j has M in one more column
  // [dx, *dA, *dB, *Q]   dx = sum_j dy_j W_j   [*, K], left out without `need_dx`, then lora_backward_ of the dy_j
  // given x [*, K] and dy_j [*, N_j] have two dimensions or more; W has those of dy_j. Nothing where a product is not
  // one of matrices as they lie in memory, where an operand is none that the kernels read, or where torch has no such
  // matmul.
  m.def(
      "linear_lora_forward(Tensor x, Tensor[] W, Tensor?[] bias, Tensor[] A, Tensor? P, Tensor[] B, int[] outputs, "
      "int[] columns, float[] scales, bool moments, Tensor? seed=None, float p=0, int[] streams=[]) -> Tensor[]");
  m.def(
      "linear_lora_backward(Tensor[] dy, Tensor x, Tensor h, Tensor[] W, Tensor[] A, Tensor[] B, int[] outputs, "
      "int[] columns, float[] scales, int probes, bool need_dx, bool need_dA, bool need_dB, Tensor? seed=None, float "
      "p=0, int[] streams=[]) -> Tensor[]");
  // lora_forward_ of each of G adapters on its own rows: rows order[p] for p from ranges[g, 0] to ranges[g, 1], or rows
  // p where `order` (int64 [M]) is empty. ranges is int64 [G, 2] and does not overlap; rows of no adapter keep y and
  // have zeros in h. A, B, scales: adapter by adapter, projection by projection. starts: of each adapter, the first
  // column of h of each projection, then its rank. P: none, or [k_g, K] for each adapter.
  // h is as wide as the widest R_g + k_g, with zeros behind narrower ones. moments: of each adapter's own rows, adapter
  // by adapter. A row of h and y has the same bits whatever the other rows are.
  m.def(
      "lora_grouped_forward_(Tensor(a!)[] y, Tensor x, Tensor[] A, Tensor[] P, Tensor[] B, Tensor order, Tensor "
      "ranges, int[] outputs, int[] columns, float[] scales, int[] starts, bool moments) -> (Tensor h, Tensor[] "
      "moments)");
  // lora_backward_ of each adapter on its own rows, with probes[g] columns of h after its ranks. Gradients of an
  // adapter without rows are zero. Q is empty where no adapter has probes. A row of dx has the same bits whatever the
  // other rows are.
  m.def(
      "lora_grouped_backward_(Tensor(a!)? dx, Tensor[] dy, Tensor x, Tensor h, Tensor[] A, Tensor[] B, Tensor order, "
      "Tensor ranges, int[] outputs, int[] columns, float[] scales, int[] starts, int[] probes, bool need_dA, bool "
      "need_dB) -> (Tensor[] dA, Tensor[] dB, Tensor[] Q)");

  // x A^T   [M, K], [R, K] -> [M, R], one dtype
  m.def("shrink(Tensor x, Tensor A) -> Tensor");
  // y[:, columns_i] += scale_i h[:, offsets_i] factors_i   for factors_i [r_i, n_i] in turn, rounding y after each
  // h and the factors have y's dtype or float32. Returns the moments of y, [2, N] float64, or [0] without.
  m.def(
      "expand_(Tensor(a!) y, Tensor h, Tensor[] factors, int[] offsets, int[] columns, float[] scales, "
      "bool moments) -> Tensor");
  // dh, dA, dB and Q as of lora_backward_, all in float32, dA for all `rank` ranks in one piece ([0, K] without):
  // dh[:, offsets_i] = scale_i dy_i B_i   [M, rank], zero in columns of no projection. dy, h and B have x's dtype.
  m.def(
      "wgrad(Tensor x, Tensor[] dy, Tensor h, Tensor[] B, int[] offsets, float[] scales, int rank, int probes, "
      "bool need_dA) -> (Tensor dh, Tensor dA, Tensor[] dB, Tensor[] Q)");
  // d^T x   [M, R], [M, N] -> [R, N] float32; d has x's dtype or float32
  m.def("outer(Tensor d, Tensor x) -> Tensor");
  // x keep / (1 - p)   keep: Philox bits of (seed, projection, row, column); seed is an int64 scalar, 0 <= p < 1
  m.def("dropout(Tensor x, Tensor seed, int projection, float p) -> Tensor");
  // The same where row m draws with seed keys[m, 0] as row keys[m, 1]; keys is int64 [M, 2].
  m.def("dropout_rows(Tensor x, Tensor keys, int projection, float p) -> Tensor");

  // out = 1 or -1 by the bits of Philox counters, 128 of each counter (i, step, first + group, tag), i < counts[group]
  // out is contiguous float32 [128 sum counts], seed an int64 scalar; step, first and tag fit in 32 bits.
  m.def("philox_signs_(Tensor(a!) out, Tensor seed, int step, int first, int tag, int[] counts) -> ()");
  // sums += [sum of tile^2, sum of |tile|]   sums is float64 [2], tile contiguous float32
  m.def("add_norms_(Tensor(a!) sums, Tensor tile) -> ()");

  // The rows of each adapter by ids, int64 [M], where -1 is none: positions ranges[g, 0] to ranges[g, 1] in `order`,
  // the rows sorted stably by adapter, those of none last. On the CPU `order` is empty where each adapter's rows are
  // one run: positions are rows then. An adapter without rows has 0 to 0.
  m.def("build_segments(Tensor ids, int adapters) -> (Tensor order, Tensor ranges)");
  // (adapter, first position) of each tile of at most `block` positions of one adapter, and (-1, 0) once there are no
  // more   int64 [ceil(rows / block) + adapters, 2]; ranges has at most `rows` positions in all, block >= 1
  m.def("segment_tiles(Tensor ranges, int rows, int block) -> Tensor");

  // sum_i weights_i scales_i^2 ||B_i A_i||_F^2   float32 []; weights is float32 or float64 [matrices]
  // By fp32 Gram matrices [r, r], added in float64.
  m.def("penalty(Tensor[] A, Tensor[] B, float[] scales, Tensor weights) -> Tensor");
  // dA_i += c_i B_i^T B_i A_i,   dB_i += c_i B_i A_i A_i^T,   c_i = 2 weight weights_i scales_i^2
  // Gradients have the shapes of their factors, or no elements: those are left out.
  m.def(
      "penalty_grad_(Tensor(a!)[] dA, Tensor(b!)[] dB, Tensor[] A, Tensor[] B, float[] scales, Tensor weights, "
      "float weight) -> ()");
  // [||t_0||^2, ||t_1||^2, ...]   float64; one tensor or more of any shape, float64 too
  m.def("squared_norms(Tensor[] tensors) -> Tensor");
  // sqrt(max(0, ||w||^2 + 2 scale b (A w) + scale^2 b (A A^T) b)) = ||w + scale b A|| for each row w of W [N, K] and b
  // of B [N, r]   float32 [N]; A is [r, K]
  m.def("row_norms(Tensor W, Tensor A, Tensor B, float scale) -> Tensor");
  // For each run of columns, the sum over it of max(0, E y^2 - (E y)^2)   float64 [runs of all]
  // moments_i, one or more, is [sum y; sum y^2] with the number of rows in one more column, float64; the next runs[i]
  // of `sizes` split its other columns.
  m.def("output_variances(Tensor[] moments, int[] runs, int[] sizes) -> Tensor");
  // to_i[r, c] = source_i[r, c] where source_i has that element, else 0   one pair or more of matrices of one dtype,
  // float64 too, that differ in one size
  m.def("resize_ranks_(Tensor(a!)[] to, Tensor[] source) -> ()");

  // The instruction set of this process: avx512_bf16, avx512, avx2 or portable.
  m.def("cpu_isa() -> str");

  // The address of what fastlora._node calls at every step of a tracker (csrc/sample.h).
  m.def("sample_calls() -> int");

  // Call plans (csrc/plan.h). open_plans: takes in the registry of fastlora._plan and the driver's library; "" or why
  // plans cannot run. keep_plan: files a plan under (cache, variant, shapes of the inputs). run_plan: the results of
  // the plan that was kept for inputs like these, or nothing where there is none; both lists may be empty.
  m.def("open_plans(int registry, str driver) -> str");
  m.def("keep_plan(int cache, int variant, int plan, Tensor[] inputs, Tensor[] constants) -> ()");
  m.def("run_plan(int cache, int variant, Tensor[] inputs) -> Tensor[]");
}

// One call for the small matrices of all layers: the penalty and its gradient, statistics, copies to another rank.
// Threads take whole matrices, so that results do not depend on their number.
#include <cstring>
#include <limits>
#include <numeric>

#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "sample.h"

namespace fastlora {
namespace {

using TensorList = std::vector<Tensor>;

// Calls f(i) for every matrix; `work` is the number of operations of all of them.
template <class F>
void for_each_matrix(size_t count, int64_t work, const F& f) {
  constexpr int64_t kWorkPerThread = worth_a_thread(1 << 20);
  const int64_t matrices = static_cast<int64_t>(count);
  const int64_t grain = work > kWorkPerThread ? matrices * kWorkPerThread / work + 1 : matrices;
  parallel_for(matrices, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(static_cast<size_t>(i));
  });
}

// A whole matrix as fp32, widened where it is narrower.
struct AsFp32 {
  Scratch<float> own;
  RowsOf<float> rows{};

  explicit AsFp32(const Matrix& matrix) : own(matrix.dtype == ScalarType::Float ? 0 : matrix.rows * matrix.columns) {
    with_type(matrix.dtype, [&](auto type) {
      rows = rows_as(matrix.row<decltype(type)>(0), matrix.stride, matrix.rows, matrix.columns, own.get());
    });
  }
};

// A [r, K] and B [N, r] of one matrix, with weight * scale^2.
struct Factors {
  Matrix A, B;
  double coefficient;
  int64_t rank;
};

std::vector<Factors> read_factors(const TensorList& A, const TensorList& B, const std::vector<double>& scales,
                                  const Tensor& weights_) {
  const size_t count = A.size();
  check_entries(B.size(), "B", count, "A");
  check_entries(scales.size(), "scales", count, "A");
  const ScalarType dtype = weights_.scalar_type();
  STD_TORCH_CHECK(weights_.dim() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), "weights has ",
                  weights_.dim(), " dimensions and dtype ", dtype, "; a Float or Double vector is needed");
  STD_TORCH_CHECK(weights_.numel() == static_cast<int64_t>(count), "weights has ", weights_.numel(),
                  " entries, but A has ", count);
  const Tensor weights = torch::stable::contiguous(weights_);
  const void* weight = weights.const_data_ptr();
  std::vector<Factors> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const double w =
        dtype == ScalarType::Float ? static_cast<const float*>(weight)[i] : static_cast<const double*>(weight)[i];
    Factors pair{read_matrix(A[i], "A"), read_matrix(B[i], "B"), w * scales[i] * scales[i], A[i].size(0)};
    STD_TORCH_CHECK(pair.B.columns == pair.rank, "B[", i, "] has ", pair.B.columns, " columns, but A[", i, "] has ",
                    pair.rank, " rows (rank)");
    out.push_back(std::move(pair));
  }
  return out;
}

int64_t work_of(const std::vector<Factors>& factors) {
  int64_t work = 0;
  for (const Factors& pair : factors) work += pair.rank * pair.rank * (pair.A.columns + pair.B.rows);
  return work;
}

// A A^T and B^T B, both [r, r].
struct Grams {
  Scratch<float> of_A, of_B;

  Grams(const AsFp32& A, const AsFp32& B, const Factors& pair)
      : of_A(pair.rank * pair.rank), of_B(pair.rank * pair.rank) {
    const int64_t r = pair.rank;
    dot(A.rows, r, A.rows, r, pair.A.columns, of_A.get(), r);
    std::fill_n(of_B.get(), r * r, 0.0f);
    if (pair.B.rows > 0) add_outer(B.rows, r, B.rows, pair.B.rows, r, of_B.get());
  }
};

// sum_i weights[i] scales[i]^2 ||B_i A_i||_F^2
Tensor penalty(const TensorList& A, const TensorList& B, const std::vector<double>& scales, const Tensor& weights) {
  const std::vector<Factors> factors = read_factors(A, B, scales, weights);
  std::vector<double> values(factors.size());
  for_each_matrix(factors.size(), work_of(factors), [&](size_t i) {
    const Factors& pair = factors[i];
    if (pair.rank == 0) return;
    const Grams grams(AsFp32(pair.A), AsFp32(pair.B), pair);
    double sum = 0.0;
    for (int64_t e = 0; e < pair.rank * pair.rank; ++e)
      sum += static_cast<double>(grams.of_A.get()[e]) * grams.of_B.get()[e];
    values[i] = pair.coefficient * sum;
  });
  Tensor result = new_tensor({}, ScalarType::Float);
  double total = 0.0;
  for (const double value : values) total += value;
  *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(total);
  return result;
}

void check_gradients(const TensorList& gradients, const char* name, const TensorList& factors, const char* of) {
  check_entries(gradients.size(), name, factors.size(), of);
  for (size_t i = 0; i < factors.size(); ++i) {
    const Tensor& gradient = gradients[i];
    if (gradient.numel() == 0) continue;
    check_matrix(gradient, name);
    check_dtype(gradient.scalar_type(), name);
    STD_TORCH_CHECK(gradient.size(0) == factors[i].size(0) && gradient.size(1) == factors[i].size(1), name, "[", i,
                    "] is ", gradient.size(0), " x ", gradient.size(1), ", but ", of, "[", i, "] is ",
                    factors[i].size(0), " x ", factors[i].size(1));
    STD_TORCH_CHECK(gradient.size(1) <= 1 || gradient.stride(1) == 1, name, "[", i, "] has column stride ",
                    gradient.stride(1), "; 1 is needed");
  }
}

// gradient [rows, columns] += s [rows, r] b [r, columns]
template <class T>
void add_product(T* gradient, int64_t ldg, int64_t rows, int64_t columns, const RowsOf<float>& s,
                 const RowsOf<float>& b, int64_t rank) {
  kernels().of<T>().expand(s.data, s.stride, rows, b.data, b.stride, rank, columns, gradient, ldg);
}

// gradient [rows, r] += s [rows, r] b [r, r]. Rows narrower than a vector go several at a time: as one row that meets a
// matrix with copies of b on its diagonal.
template <class T>
void add_narrow(T* gradient, int64_t ldg, int64_t rows, const RowsOf<float>& s, const float* b, int64_t r) {
  constexpr int64_t kWidest = 16;
  const int64_t folds = ldg == r && s.stride == r ? kWidest / r : 1;
  if (folds < 2 || rows < folds) {
    add_product(gradient, ldg, rows, r, s, {b, r}, r);
    return;
  }
  const int64_t width = folds * r, whole = rows / folds;
  float diagonal[kWidest * kWidest] = {};
  for (int64_t fold = 0; fold < folds; ++fold) {
    for (int64_t q = 0; q < r; ++q) std::copy_n(b + q * r, r, diagonal + (fold * r + q) * width + fold * r);
  }
  add_product(gradient, width, whole, width, {s.data, width}, {diagonal, width}, width);
  const int64_t done = whole * folds;
  if (done < rows) add_product(gradient + done * r, r, rows - done, r, {s.data + done * r, r}, {b, r}, r);
}

// dA_i += c_i (B_i^T B_i) A_i,  dB_i += c_i B_i (A_i A_i^T),  c_i = 2 weight weights[i] scales[i]^2; empty ones are
// left out
void penalty_grad_(TensorList dA, TensorList dB, const TensorList& A, const TensorList& B,
                   const std::vector<double>& scales, const Tensor& weights, double weight) {
  const std::vector<Factors> factors = read_factors(A, B, scales, weights);
  check_gradients(dA, "dA", A, "A");
  check_gradients(dB, "dB", B, "B");
  for_each_matrix(factors.size(), 2 * work_of(factors), [&](size_t i) {
    const Factors& pair = factors[i];
    const bool into_A = dA[i].numel() > 0, into_B = dB[i].numel() > 0;
    if (pair.rank == 0 || !(into_A || into_B)) return;
    const AsFp32 A_as_fp32(pair.A), B_as_fp32(pair.B);
    const Grams grams(A_as_fp32, B_as_fp32, pair);
    const float c = static_cast<float>(2.0 * weight * pair.coefficient);
    for (int64_t e = 0; e < pair.rank * pair.rank; ++e) {
      grams.of_A.get()[e] *= c;
      grams.of_B.get()[e] *= c;
    }
    const int64_t r = pair.rank;
    if (into_A) {
      with_type(dA[i].scalar_type(), [&](auto type) {
        add_product(static_cast<decltype(type)*>(dA[i].mutable_data_ptr()), dA[i].stride(0), r, pair.A.columns,
                    {grams.of_B.get(), r}, A_as_fp32.rows, r);
      });
    }
    if (into_B) {
      with_type(dB[i].scalar_type(), [&](auto type) {
        add_narrow(static_cast<decltype(type)*>(dB[i].mutable_data_ptr()), dB[i].stride(0), pair.B.rows, B_as_fp32.rows,
                   grams.of_A.get(), r);
      });
    }
  });
}

template <class T>
double squared_norm(const T* data, int64_t count) {
  constexpr int64_t kBlock = 4096;
  double squares = 0.0, absolute = 0.0;
  if constexpr (std::is_same_v<T, float>) {
    kernels().norms(data, count, &squares, &absolute);
  } else {
    const Scratch<float> as_fp32(std::min(count, kBlock));
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t part = std::min(kBlock, count - i);
      kernels().of<T>().widen(data + i, as_fp32.get(), part);
      kernels().norms(as_fp32.get(), part, &squares, &absolute);
    }
  }
  return squares;
}

double squared_norm(const double* data, int64_t count) {
  double squares = 0.0;
  for (int64_t i = 0; i < count; ++i) squares += data[i] * data[i];
  return squares;
}

// float64 sum of the squares of each tensor
Tensor squared_norms(const TensorList& tensors) {
  Tensor result = new_tensor({static_cast<int64_t>(tensors.size())}, ScalarType::Double);
  double* const out = static_cast<double*>(result.mutable_data_ptr());
  TensorList dense;
  int64_t work = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].scalar_type() != ScalarType::Double) check_dtype(tensors[i].scalar_type(), "tensors");
    dense.push_back(torch::stable::contiguous(tensors[i]));
    work += tensors[i].numel();
  }
  for_each_matrix(dense.size(), work, [&](size_t i) {
    const void* data = dense[i].const_data_ptr();
    const int64_t count = dense[i].numel();
    if (dense[i].scalar_type() == ScalarType::Double) {
      out[i] = squared_norm(static_cast<const double*>(data), count);
      return;
    }
    with_type(dense[i].scalar_type(),
              [&](auto type) { out[i] = squared_norm(static_cast<const decltype(type)*>(data), count); });
  });
  return result;
}

constexpr int64_t kLanes = 8;  // sums side by side

// Of the next runs of columns of [sum y; sum y^2 | rows]: sum over a run of max(0, E y^2 - (E y)^2)
void write_variances(const double* sum, int64_t columns, const int64_t* sizes, int64_t runs, double* out) {
  const double *square = sum + columns + 1, rows = sum[columns];
  for (int64_t run = 0; run < runs; ++run) {
    // In units of 1 / rows^2, so that nothing is divided on the way; NaN stays.
    double lanes[kLanes] = {};
    const auto add = [&](int64_t lane, int64_t column) {
      const double variance = square[column] * rows - sum[column] * sum[column];
      lanes[lane] += variance < 0.0 ? 0.0 : variance;
    };
    int64_t n = 0;
    for (; n + kLanes <= sizes[run]; n += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, n + lane);
    }
    for (; n < sizes[run]; ++n) add(0, n);
    out[run] = std::accumulate(lanes, lanes + kLanes, 0.0) / rows / rows;
    sum += sizes[run], square += sizes[run];
  }
}

Tensor output_variances(const TensorList& moments, const std::vector<int64_t>& runs,
                        const std::vector<int64_t>& sizes) {
  check_entries(runs.size(), "runs", moments.size(), "moments");
  TensorList dense;
  size_t first = 0;
  for (size_t i = 0; i < moments.size(); ++i) {
    check_matrix(moments[i], "moments");
    check_same_dtype(moments[i].scalar_type(), "moments", ScalarType::Double, "the sums of every layer");
    STD_TORCH_CHECK(runs[i] >= 0 && first + static_cast<size_t>(runs[i]) <= sizes.size(), "runs: more than the ",
                    sizes.size(), " sizes were asked for");
    int64_t columns = 1;
    for (int64_t run = 0; run < runs[i]; ++run, ++first) columns += sizes[first];
    STD_TORCH_CHECK(moments[i].size(0) == 2 && moments[i].size(1) == columns, "moments[", i, "] is ",
                    moments[i].size(0), " x ", moments[i].size(1), "; its sizes make 2 x ", columns);
    dense.push_back(torch::stable::contiguous(moments[i]));
  }
  STD_TORCH_CHECK(first == sizes.size(), "sizes has ", sizes.size(), " entries, but runs ask for ", first);
  Tensor result = new_tensor({static_cast<int64_t>(sizes.size())}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  const int64_t* size = sizes.data();
  for (size_t i = 0; i < dense.size(); ++i) {
    const double* sum = static_cast<const double*>(dense[i].const_data_ptr());
    write_variances(sum, dense[i].size(1) - 1, size, runs[i], out);
    size += runs[i], out += runs[i];
  }
  return result;
}

void check_resize(const Tensor& to, const Tensor& from, size_t i) {
  check_matrix(to, "to");
  check_matrix(from, "source");
  const ScalarType dtype = to.scalar_type();
  if (dtype != ScalarType::Double) check_dtype(dtype, "to");
  check_same_dtype(from.scalar_type(), "source", dtype, "to");
  STD_TORCH_CHECK(to.size(0) == from.size(0) || to.size(1) == from.size(1), "to[", i, "] is ", to.size(0), " x ",
                  to.size(1), ", but source[", i, "] is ", from.size(0), " x ", from.size(1),
                  "; only the rank may differ");
  STD_TORCH_CHECK(to.size(1) <= 1 || to.stride(1) == 1, "to[", i, "] has column stride ", to.stride(1),
                  "; 1 is needed");
}

// to_i = source_i where both have the row and the column, else 0
void resize_ranks_(TensorList to, const TensorList& source) {
  check_entries(source.size(), "source", to.size(), "to");
  TensorList dense;
  int64_t work = 0;
  for (size_t i = 0; i < to.size(); ++i) {
    check_resize(to[i], source[i], i);
    const bool direct = source[i].size(1) <= 1 || source[i].stride(1) == 1;
    dense.push_back(direct ? source[i] : torch::stable::contiguous(source[i]));
    work += to[i].numel();
  }
  for_each_matrix(to.size(), work, [&](size_t i) {
    const ScalarType dtype = to[i].scalar_type();
    const int64_t item = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    const int64_t rows = to[i].size(0), columns = to[i].size(1);
    const int64_t row_bytes = columns * item, ldt = to[i].stride(0) * item, lds = dense[i].stride(0) * item;
    if (rows == 0 || columns == 0) return;
    char* target = static_cast<char*>(to[i].mutable_data_ptr());
    const char* data = static_cast<const char*>(dense[i].const_data_ptr());
    const int64_t kept = std::min(rows, dense[i].size(0)), copied = std::min(columns, dense[i].size(1)) * item;
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t bytes = m < kept ? copied : 0;
      if (bytes > 0) std::memcpy(target + m * ldt, data + m * lds, static_cast<size_t>(bytes));
      std::memset(target + m * ldt + bytes, 0, static_cast<size_t>(row_bytes - bytes));
    }
  });
}

}  // namespace

void fold_sample(const Sample& sample, const SampleAverages& averages) {
  const size_t matrices = static_cast<size_t>(averages.matrices);
  const bool both = !sample.Q.empty() && !sample.V.empty();
  std::vector<double> f((both ? 2 : 1) * matrices);
  double* const squares = f.data() + (both && !averages.squares_first ? matrices : 0);
  double* variances = f.data() + (both && averages.squares_first ? matrices : 0);
  int64_t work = 0;
  for (const LeafGradient& gradient : sample.Q) work += gradient.count;
  for_each_matrix(sample.Q.size(), work, [&](size_t i) {
    const auto& [data, count, wide] = sample.Q[i];
    squares[i] = sample.factor * (wide ? squared_norm(static_cast<const double*>(data), count)
                                       : squared_norm(static_cast<const float*>(data), count));
  });
  const int64_t* size = sample.sizes.data();
  for (size_t i = 0; i < sample.V.size(); ++i) {
    const int64_t runs = sample.runs[i];
    write_variances(static_cast<const double*>(sample.V[i].data), sample.V[i].count / 2 - 1, size, runs, variances);
    size += runs, variances += runs;
  }
  if (!std::all_of(f.begin(), f.end(), [](double v) { return v < std::numeric_limits<double>::infinity(); })) {
    ++*averages.skipped;
    return;
  }
  const double n = static_cast<double>(sample.n);
  for (size_t i = 0; i < f.size(); ++i) {
    averages.steps[i] += n;
    const double w = sample.weight < 0.0 ? n / std::max(averages.steps[i], 1.0) : sample.weight;
    averages.means[i] += (f[i] - averages.means[i]) * w;
  }
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("penalty", TORCH_BOX(&fastlora::penalty));
  m.impl("penalty_grad_", TORCH_BOX(&fastlora::penalty_grad_));
  m.impl("squared_norms", TORCH_BOX(&fastlora::squared_norms));
  m.impl("output_variances", TORCH_BOX(&fastlora::output_variances));
  m.impl("resize_ranks_", TORCH_BOX(&fastlora::resize_ranks_));
}

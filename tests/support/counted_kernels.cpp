// The passes over many adapters, on kernels that count the multiply-adds they are asked for: the sources of the shipped
// library, registered as operators of the namespace fastlora_counted.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/kernels.h"

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(ns##_counted, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_counted, key, m, C10_UID)

#include "cpu/grouped_backward.cpp"
#include "cpu/grouped_forward.cpp"
#include "library.cpp"

namespace fastlora {

namespace portable {
extern const Kernels table;
}

namespace {

std::atomic<int64_t> multiply_adds{0};

void counted_dot(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t lda, int64_t rank, int64_t depth,
                 float* s, int64_t lds) {
  multiply_adds += rows * rank * depth;
  portable::table.dot(x, ldx, rows, a, lda, rank, depth, s, lds);
}

void counted_outer(const float* d, int64_t ldd, int64_t rank, const float* x, int64_t ldx, int64_t rows,
                   int64_t columns, float* g, int64_t ldg) {
  multiply_adds += rows * rank * columns;
  portable::table.outer(d, ldd, rank, x, ldx, rows, columns, g, ldg);
}

template <class T>
void counted_expand(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank,
                    int64_t columns, T* y, int64_t ldy) {
  multiply_adds += rows * rank * columns;
  portable::table.of<T>().expand(s, lds, rows, b, ldb, rank, columns, y, ldy);
}

Kernels counted() {
  Kernels table = portable::table;
  table.dot = counted_dot;
  table.outer = counted_outer;
  table.of_float.expand = counted_expand<float>;
  table.of_bf16.expand = counted_expand<bf16>;
  table.of_fp16.expand = counted_expand<fp16>;
  return table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = counted();
  return table;
}

bool in_forked_child() { return false; }

}  // namespace fastlora

// What was counted since the last call.
extern "C" __attribute__((visibility("default"))) int64_t take_multiply_adds() {
  return fastlora::multiply_adds.exchange(0);
}

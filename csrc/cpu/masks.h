// The masks of dropout: bits of (seed, projection, row, column) that each direction makes again.
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/checks.h"
#include "cpu/kernels.h"

namespace fastlora {

inline DropoutRow read_mask(int64_t projection, double p) {
  STD_TORCH_CHECK(projection >= 0 && projection <= 0xffffffffll, "projection is ", projection,
                  "; accepted: 0 to 2^32 - 1");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "p is ", p, "; accepted: 0 <= p < 1");
  DropoutRow mask{};
  mask.projection = static_cast<uint32_t>(projection);
  mask.threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 4294967296.0), 4294967295.0));
  mask.scale = static_cast<float>(1.0 / (1.0 - p));
  return mask;
}

// The masks of the projections of a call; none without dropout.
struct Masks {
  std::vector<DropoutRow> rows;
  int64_t columns = 0, words = 0;  // of a row

  explicit operator bool() const { return !rows.empty(); }
  float scale() const { return rows[0].scale; }

  // Of `count` rows of projection i from row m.
  void write(size_t i, int64_t m, int64_t count, uint32_t* bits) const {
    DropoutRow row = rows[i];
    row.row = m;
    kernels().keep_bits(columns, row, count, bits);
  }
};

inline Masks read_masks(const std::optional<Tensor>& seed, double p, const std::vector<int64_t>& streams,
                        size_t projections, int64_t columns) {
  Masks out;
  if (!seed) return out;
  check_entries(streams.size(), "streams", projections, "A");
  out.columns = columns, out.words = (columns + 31) / 32;
  for (const int64_t stream : streams) {
    out.rows.push_back(read_mask(stream, p));
    out.rows.back().seed = read_seed(*seed);
  }
  return out;
}

// out = rows of x [rows, columns] under their masks, contiguous; bits: those of the rows.
template <class V>
void keep_rows(const Masks& masks, const V* x, int64_t stride, int64_t rows, const uint32_t* bits, V* out) {
  for (int64_t m = 0; m < rows; ++m, x += stride, bits += masks.words, out += masks.columns) {
    if constexpr (std::is_same_v<V, float>) {
      kernels().keep(x, bits, out, masks.columns);
    } else {
      kernels().keep_bf16(x, bits, out, masks.columns);
    }
  }
}

// s[m, r] *= 1 / (1 - p), rank columns of each of the rows
inline void scale_kept(const Masks& masks, float* s, int64_t stride, int64_t rows, int64_t rank) {
  const float scale = masks.scale();
  for (int64_t m = 0; m < rows; ++m, s += stride) {
    for (int64_t r = 0; r < rank; ++r) s[r] *= scale;
  }
}

}  // namespace fastlora

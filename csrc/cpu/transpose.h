// Transposes of skinny matrices, in squares of four vectors.
#pragma once
#include <cstdint>

namespace fastlora {

typedef float Square __attribute__((vector_size(16)));

// to[j, i] = scale * from[i, j]; strides count elements, and the last one of both is 1.
inline void transpose_scaled(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float scale, float* to,
                             int64_t ld_to) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4) {
    for (int64_t j = 0; j < whole_columns; j += 4) {
      Square row[4];
      for (int q = 0; q < 4; ++q) __builtin_memcpy(&row[q], from + (i + q) * ld_from + j, sizeof row[q]);
      const Square a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Square b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Square c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Square d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      row[0] = scale * __builtin_shufflevector(a, c, 0, 1, 4, 5);
      row[1] = scale * __builtin_shufflevector(a, c, 2, 3, 6, 7);
      row[2] = scale * __builtin_shufflevector(b, d, 0, 1, 4, 5);
      row[3] = scale * __builtin_shufflevector(b, d, 2, 3, 6, 7);
      for (int q = 0; q < 4; ++q) __builtin_memcpy(to + (j + q) * ld_to + i, &row[q], sizeof row[q]);
    }
    for (int64_t j = whole_columns; j < columns; ++j) {
      for (int q = 0; q < 4; ++q) to[j * ld_to + i + q] = scale * from[(i + q) * ld_from + j];
    }
  }
  for (int64_t i = whole_rows; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * ld_to + i] = scale * from[i * ld_from + j];
  }
}

}  // namespace fastlora

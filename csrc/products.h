// The matrix products after a backward scan on the CPU: the gradients of weights and input.
//
// 16-bit tensors are multiplied in float32: everything between the storage types of two layers is exact to float.
#pragma once

#include "tensors.h"

namespace fastrnn {

// The same values in the compute dtype: the tensor itself, or for a 16-bit tensor a float32 copy.
Tensor to_compute(const Tensor& t, Dtype dtype);
// And back: the tensor itself, or a copy in the 16-bit dtype.
Tensor to_storage(const Tensor& t, Dtype dtype, ScalarType storage);

// Rows [first, first + rows) of one group of an array over time: [N, width] of [D, N, width], or of the output
// [N, D, width].
struct Rows {
  const Tensor& array;
  int64_t row_stride, offset;

  static Rows of_group(const Tensor& array, int64_t d, int64_t N, int64_t width) {
    return {array, width, d * N * width};
  }
  static Rows of_output(const Tensor& output, int64_t d, int64_t D, int64_t P) { return {output, D * P, d * P}; }
  // [rows, width], or its transpose; from column `column` on
  Tensor block(int64_t first, int64_t rows, int64_t column, int64_t width, bool transposed = false) const {
    const int64_t start = offset + first * row_stride + column;
    return transposed ? matrix(array, width, rows, 1, row_stride, start)
                      : matrix(array, rows, width, row_stride, 1, start);
  }
};

// result [rows of it `target_rows`, K] (+)= sum over n of a[a_first + n, column .. column + target_rows]^T
// b[b_first + n, 0 .. K], in blocks of rows, so that long sums stay as exact as torch.nn's, which go step by step.
void outer_product(const Tensor& result, int64_t target_row, int64_t target_rows, int64_t K, const Rows& a,
                   int64_t column, int64_t a_first, const Rows& b, int64_t b_first, int64_t rows, bool add);

// [columns] sums over all rows of one group of [D, N, columns].
void sum_over_rows(const Tensor& array, int64_t d, int64_t N, int64_t columns, const Tensor& sums, int64_t first,
                   int64_t source_column, int64_t count, bool is_double);

}  // namespace fastrnn

// The matrix products after a backward scan on the CPU: the gradients of weights and input.
//
// 16-bit tensors are multiplied as float32: everything between the storage types of two layers is exact to float.
#pragma once

#include "problem.h"

namespace fastrnn {

// Values of the compute dtype in the dtype of the layer: the tensor itself, or a copy in the 16-bit dtype.
Tensor to_storage(const Tensor& t, Dtype dtype, ScalarType storage);

// Rows of an array: of one group of an array over time [D, N, width], or of the output [N, D, width].
struct Rows {
  Array array;
  int64_t row_stride, offset;

  static Rows of_matrix(const Array& array, int64_t width) { return {array, width, 0}; }
  static Rows of_group(const Array& array, int64_t d, int64_t N, int64_t width) {
    return {array, width, d * N * width};
  }
  static Rows of_output(const Array& output, int64_t d, int64_t D, int64_t P) { return {output, D * P, d * P}; }
  // From this row, and this column, on.
  Rows from(int64_t row, int64_t column = 0) const { return {array, row_stride, offset + row * row_stride + column}; }
  void* data() const { return static_cast<char*>(array.data) + static_cast<size_t>(offset * item_size(array.dtype)); }
};

// result [target_rows, K] (+)= sum over `rows` rows of a[n, 0..target_rows]^T b[n, 0..K]. a and result in the compute
// dtype, b in any.
void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b, int64_t rows,
                   bool add);

// result [rows, columns] (+)= a [rows, K] b [K, columns]
void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K, bool add);

// [columns] sums over all rows of one group of [D, N, columns].
void sum_over_rows(const Array& array, int64_t d, int64_t N, int64_t columns, const Array& sums, int64_t first,
                   int64_t source_column, int64_t count, bool is_double);

}  // namespace fastrnn

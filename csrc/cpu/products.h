// The matrix products after a backward scan on the CPU: the gradients of weights and input.
//
// 16-bit tensors are multiplied as float32: everything between the storage types of two layers is exact to float.
#pragma once

#include "../device.h"

namespace fastrnn::cpu {

// Values of the compute dtype in the dtype of the layer: the tensor itself, or a copy in the 16-bit dtype.
Tensor to_storage(const Tensor& t, ScalarType storage);

// result [target_rows, K] (+)= sum over `rows` rows of a[n, 0..target_rows]^T b[n, 0..K]. a and result in the compute
// dtype, b in any, or a list of rows.
void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b, int64_t rows,
                   bool add);

// result [rows, columns] (+)= a [rows, K] b [K, columns]
void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K, bool add);

// sums[column] = sum over `rows` rows of columns [0, columns)
void sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums);

}  // namespace fastrnn::cpu

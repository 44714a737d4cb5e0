// Where a layer runs: its memory, the passes along time, and the matrix products behind a backward pass. ops.cpp is
// written on this; csrc/cpu/device.cpp and csrc/cuda/device.h are what there is.
#pragma once

#include <functional>
#include <memory>

#include "problem.h"

namespace fastrnn {

// Rows of an array: of one group of an array over time [D, N, width], or of the output [N, D, width]; or rows that lie
// anywhere, of which the array lists the addresses.
struct Rows {
  Array array;
  int64_t row_stride, offset;
  bool is_list = false;

  static Rows of_matrix(const Array& array, int64_t width) { return {array, width, 0}; }
  static Rows of_group(const Array& array, int64_t d, int64_t N, int64_t width) {
    return {array, width, d * N * width};
  }
  static Rows of_output(const Array& output, int64_t d, int64_t D, int64_t P) { return {output, D * P, d * P}; }
  static Rows of_input(const Array& input, int64_t d, int64_t M, int64_t I) { return {input, M * I, d % M * I}; }
  static Rows of_list(const void* const* rows, ScalarType dtype) {
    return {{const_cast<const void**>(rows), dtype}, 1, 0, true};
  }
  // From this row, and this column, on. Of a list: from this row on.
  Rows from(int64_t row, int64_t column = 0) const {
    return {array, row_stride, offset + row * row_stride + column, is_list};
  }
  // Each `apart`-th of them, from this one on.
  Rows each(int64_t apart, int64_t first) const {
    return {array, row_stride * apart, offset + first * row_stride, is_list};
  }
  void* data() const {
    const size_t item = is_list ? sizeof(void*) : static_cast<size_t>(item_size(array.dtype));
    return static_cast<char*>(array.data) + static_cast<size_t>(offset) * item;
  }
};

class Device {
 public:
  explicit Device(Place place) : place_(place) {}
  Device(const Device&) = delete;
  virtual ~Device() = default;

  const Place& place() const { return place_; }
  Tensor make(const Sizes& sizes, ScalarType dtype) const { return fastrnn::make(sizes, dtype, place_); }
  virtual Tensor zeros(const Sizes& sizes, ScalarType dtype) const = 0;

  // Memory for the gradients of gates, aligned to a cache line, until the device goes; and their dtype, for tensors of
  // a dtype. The products and sums take them, and make results of the compute dtype.
  virtual char* take_between(size_t bytes) = 0;
  virtual ScalarType between_dtype(ScalarType storage) const = 0;

  // Whether outer_product takes a list as b. Otherwise a backward pass can write the h that entered each row.
  virtual bool takes_lists() const = 0;

  virtual void run(const ScanArgs& args) = 0;
  virtual void run(const ScanBackwardArgs& args) = 0;

  // result [target_rows, K] (+)= sum over `rows` rows of a[n, 0..target_rows]^T b[n, 0..K], b in any dtype.
  virtual void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b,
                             int64_t rows, bool add) = 0;
  // result [rows, columns] (+)= a [rows, K] b [K, columns], b in any dtype
  virtual void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K,
                           bool add) = 0;
  // sums[column] = sum over `rows` rows of columns [0, columns)
  virtual void sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) = 0;
  // Calls f(0) to f(count - 1), which may run at the same time.
  virtual void for_each(int64_t count, const std::function<void(int64_t)>& f) = 0;
  // A result in the dtype of the layer: itself, or a copy.
  virtual Tensor to_storage(const Tensor& result, ScalarType storage) const = 0;

 private:
  const Place place_;
};

// The device of a tensor.
std::unique_ptr<Device> device_of(const Tensor& input);

}  // namespace fastrnn

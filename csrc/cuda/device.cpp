#include "device.h"

#include <cstdlib>

#include "gemm.h"
#include "plan.h"
#include "program.h"

namespace fastrnn::cuda {
namespace {

// What makes programs of steps, if FASTRNN_CUDA_KERNEL asks for them.
Recorder* asked_recorder() {
  const char* const asked = std::getenv("FASTRNN_CUDA_KERNEL");
  if (!asked || !*asked) return nullptr;
  const std::string reason = why_not_kernel(asked);
  STD_TORCH_CHECK(reason.empty(), "fastrnn: FASTRNN_CUDA_KERNEL=", asked, " cannot be met: ", reason);
  if (std::string(asked) != "step-graph") return nullptr;
  STD_TORCH_CHECK(recorder(), "fastrnn: FASTRNN_CUDA_KERNEL=step-graph cannot be met: nothing here records graphs");
  return recorder();
}

}  // namespace

StepDevice::StepDevice(const Place& place, const StepKernels& kernels, Queue queue)
    : Device(place), context_{*this, kernels, queue, asked_recorder()} {}

Tensor StepDevice::zeros(const Sizes& sizes, ScalarType dtype) const {
  Tensor t = make(sizes, dtype);
  torch::stable::zero_(t);
  return t;
}

char* StepDevice::take_between(size_t bytes) {
  between_.push_back(make({static_cast<int64_t>(bytes)}, ScalarType::Byte));
  return static_cast<char*>(between_.back().mutable_data_ptr());
}

void StepDevice::outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b,
                               int64_t rows, bool add) {
  product(result, target_rows, K, matrix(a, target_rows, rows, 1, a.row_stride), matrix(b, rows, K, b.row_stride, 1),
          add);
}

void StepDevice::row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K,
                             bool add) {
  product(result, rows, columns, matrix(a, rows, K, a.row_stride, 1), matrix(b, K, columns, b.row_stride, 1), add);
}

void StepDevice::sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) {
  if (columns == 0) return;
  Tensor out = view(sums.array, sums.offset, {columns}, {1}, place());
  const int64_t dim[] = {0};
  torch::stable::sum_out(out, matrix(array, rows, columns, array.row_stride, 1),
                         std::make_optional(torch::headeronly::IntHeaderOnlyArrayRef(dim, 1)), false, sums.array.dtype);
}

Tensor StepDevice::to_storage(const Tensor& result, ScalarType storage) const {
  if (result.scalar_type() == storage) return result;
  const Tensor target = make(sizes_of(result), storage);
  if (result.numel() > 0)
    context_.kernels.narrow({dtype_of(storage), result.const_data_ptr(), target.mutable_data_ptr(), result.numel()},
                            context_.queue);
  return target;
}

Tensor StepDevice::matrix(const Rows& rows, int64_t height, int64_t width, int64_t row_stride,
                          int64_t column_stride) const {
  return view(rows.array, rows.offset, {height, width}, {row_stride, column_stride}, place());
}

void StepDevice::product(const Rows& result, int64_t rows, int64_t columns, const Tensor& a, const Tensor& b,
                         bool add) const {
  const Tensor out = matrix(result, rows, columns, result.row_stride, 1);
  if (!add) return gemm(out, a, b);
  const Tensor term = make({rows, columns}, result.array.dtype);
  gemm(term, a, b);
  if (term.numel() == 0) return;
  context_.kernels.add(
      {dtype_of(result.array.dtype), term.const_data_ptr(), result.data(), term.numel(), columns, result.row_stride},
      context_.queue);
}

}  // namespace fastrnn::cuda

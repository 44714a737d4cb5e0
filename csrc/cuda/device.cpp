#include "device.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "gemm.h"
#include "program.h"
#include "sizes.h"

namespace fastrnn::cuda {
namespace {

bool is_set(const char* variable) {
  const char* const text = std::getenv(variable);
  const std::string value = text ? text : "";
  STD_TORCH_CHECK(value.empty() || value == "0" || value == "1", "fastrnn: ", variable, " must be 0 or 1, and is ",
                  value);
  return value == "1";
}

Asked asked() {
  Asked found;
  if (const char* const kernel = std::getenv("FASTRNN_CUDA_KERNEL"); kernel && *kernel) found.kernel = kernel;
  const bool disabled = is_set("FASTRNN_DISABLE_PERSISTENT");
  STD_TORCH_CHECK(!disabled || found.kernel.rfind("persistent", 0) != 0, "fastrnn: FASTRNN_CUDA_KERNEL=", found.kernel,
                  " cannot be met: FASTRNN_DISABLE_PERSISTENT=1");
  found.persistent = is_set("FASTRNN_PERSISTENT") && !disabled;
  if (const char* const exchange = std::getenv("FASTRNN_GRID_EXCHANGE"); exchange && *exchange) {
    found.flags = std::string(exchange) == "flags";
    STD_TORCH_CHECK(found.flags || std::string(exchange) == "words",
                    "fastrnn: FASTRNN_GRID_EXCHANGE must be words or flags, and is ", exchange);
  }
  if (const char* const most = std::getenv("FASTRNN_MAX_SMS"); most && *most) {
    const char* const end = most + std::strlen(most);
    const auto read = std::from_chars(most, end, found.multiprocessors);
    STD_TORCH_CHECK(
        read.ec == std::errc() && read.ptr == end && found.multiprocessors >= 1 && found.multiprocessors <= 1 << 20,
        "fastrnn: FASTRNN_MAX_SMS must be a number of multiprocessors from 1 on, and is ", most);
  }
  return found;
}

GpuLimits limited(GpuLimits gpu, const Asked& asked) {
  gpu.multiprocessors = static_cast<int>(std::min<int64_t>(gpu.multiprocessors, asked.multiprocessors));
  return gpu;
}

}  // namespace

KernelDevice::KernelDevice(const Place& place, const StepKernels& step, const BlockKernels& block,
                           const GridKernels& grid, Queue queue, const GpuLimits& gpu, Report report)
    : KernelDevice(place, step, block, grid, queue, gpu, report, asked()) {}
KernelDevice::KernelDevice(const Place& place, const StepKernels& step, const BlockKernels& block,
                           const GridKernels& grid, Queue queue, const GpuLimits& gpu, Report report,
                           const Asked& asked)
    : Device(place), context_{*this, step, block, grid, queue, limited(gpu, asked), asked, recorder(), report} {}

Tensor KernelDevice::zeros(const Sizes& sizes, ScalarType dtype) const {
  Tensor t = make(sizes, dtype);
  torch::stable::zero_(t);
  return t;
}

char* KernelDevice::take_between(size_t bytes) {
  between_.push_back(make({static_cast<int64_t>(bytes)}, ScalarType::Byte));
  return static_cast<char*>(between_.back().mutable_data_ptr());
}

void KernelDevice::outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b,
                                 int64_t rows, bool add) {
  product(result, target_rows, K, matrix(a, target_rows, rows, 1, a.row_stride), matrix(b, rows, K, b.row_stride, 1),
          add);
}

void KernelDevice::row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b,
                               int64_t K, bool add) {
  product(result, rows, columns, matrix(a, rows, K, a.row_stride, 1), matrix(b, K, columns, b.row_stride, 1), add);
}

void KernelDevice::sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) {
  if (columns == 0) return;
  Tensor out = view(sums.array, sums.offset, {columns}, {1}, place());
  const int64_t dim[] = {0};
  torch::stable::sum_out(out, matrix(array, rows, columns, array.row_stride, 1),
                         std::make_optional(torch::headeronly::IntHeaderOnlyArrayRef(dim, 1)), false, sums.array.dtype);
}

Tensor KernelDevice::to_storage(const Tensor& result, ScalarType storage) const {
  if (result.scalar_type() == storage) return result;
  const Tensor target = make(sizes_of(result), storage);
  if (result.numel() > 0)
    context_.step.narrow({dtype_of(storage), result.const_data_ptr(), target.mutable_data_ptr(), result.numel()},
                         context_.queue);
  return target;
}

Tensor KernelDevice::matrix(const Rows& rows, int64_t height, int64_t width, int64_t row_stride,
                            int64_t column_stride) const {
  return view(rows.array, rows.offset, {height, width}, {row_stride, column_stride}, place());
}

void KernelDevice::product(const Rows& result, int64_t rows, int64_t columns, const Tensor& a, const Tensor& b,
                           bool add) const {
  const Tensor out = matrix(result, rows, columns, result.row_stride, 1);
  if (!add) return gemm(out, a, b);
  const Tensor term = make({rows, columns}, result.array.dtype);
  gemm(term, a, b);
  if (term.numel() == 0) return;
  context_.step.add(
      {dtype_of(result.array.dtype), term.const_data_ptr(), result.data(), term.numel(), columns, result.row_stride},
      context_.queue);
}

}  // namespace fastrnn::cuda

// A device of the kernels of csrc/cuda: torch's allocator and matrix products, gradients of gates in the dtype of the
// layer. Of a GPU, and in tests of the host, for which the kernels are built there.
#pragma once

#include <vector>

#include "../device.h"
#include "scan_cuda.h"

namespace fastrnn::cuda {

class KernelDevice : public Device {
 public:
  // queue: the stream of the kernels, and of torch's products; report: of kernels of grids. FASTRNN_CUDA_KERNEL,
  // FASTRNN_PERSISTENT and FASTRNN_DISABLE_PERSISTENT say which kernels run; FASTRNN_GRID_EXCHANGE and FASTRNN_MAX_SMS
  // how those of grids do.
  KernelDevice(const Place& place, const StepKernels& step, const BlockKernels& block, const GridKernels& grid,
               Queue queue, const GpuLimits& gpu, Report report);

  Tensor zeros(const Sizes& sizes, ScalarType dtype) const override;
  char* take_between(size_t bytes) override;
  ScalarType between_dtype(ScalarType storage) const override { return storage; }
  bool takes_lists() const override { return false; }

  void run(const ScanArgs& args) override { scan(args, context_); }
  void run(const ScanBackwardArgs& args) override { scan(args, context_); }

  void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b, int64_t rows,
                     bool add) override;
  void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K,
                   bool add) override;
  void sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) override;
  void for_each(int64_t count, const std::function<void(int64_t)>& f) override {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
  Tensor to_storage(const Tensor& result, ScalarType storage) const override;

 private:
  KernelDevice(const Place& place, const StepKernels& step, const BlockKernels& block, const GridKernels& grid,
               Queue queue, const GpuLimits& gpu, Report report, const Asked& asked);
  Tensor matrix(const Rows& rows, int64_t height, int64_t width, int64_t row_stride, int64_t column_stride) const;
  void product(const Rows& result, int64_t rows, int64_t columns, const Tensor& a, const Tensor& b, bool add) const;

  const Context context_;
  std::vector<Tensor> between_;
};

}  // namespace fastrnn::cuda

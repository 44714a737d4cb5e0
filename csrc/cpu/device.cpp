// The CPU as a device: torch's threads, scratch memory that a thread keeps, gradients of gates in the compute dtype.
#include "../device.h"

#include <cstring>

#include "../scratch.h"
#include "products.h"
#include "scan_cpu.h"

namespace fastrnn {
namespace {

class CpuDevice final : public Device {
 public:
  using Device::Device;

  Tensor zeros(const Sizes& sizes, ScalarType dtype) const override {
    const Tensor t = make(sizes, dtype);
    if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(t.numel() * item_size(dtype)));
    return t;
  }
  char* take_between(size_t bytes) override { return between_.get(bytes); }
  ScalarType between_dtype(ScalarType storage) const override { return compute_dtype(storage); }

  bool takes_lists() const override { return true; }

  void run(const ScanArgs& args) override { scan_cpu(args); }
  void run(const ScanBackwardArgs& args) override { scan_cpu(args); }

  void outer_product(const Rows& result, int64_t target_rows, int64_t K, const Rows& a, const Rows& b, int64_t rows,
                     bool add) override {
    cpu::outer_product(result, target_rows, K, a, b, rows, add);
  }
  void row_product(const Rows& result, int64_t rows, int64_t columns, const Rows& a, const Rows& b, int64_t K,
                   bool add) override {
    cpu::row_product(result, rows, columns, a, b, K, add);
  }
  void sum_over_rows(const Rows& array, int64_t rows, int64_t columns, const Rows& sums) override {
    cpu::sum_over_rows(array, rows, columns, sums);
  }
  void for_each(int64_t count, const std::function<void(int64_t)>& f) override {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
  Tensor to_storage(const Tensor& result, ScalarType storage) const override {
    return cpu::to_storage(result, storage);
  }

 private:
  PassScratch<5> between_;
};

}  // namespace

std::unique_ptr<Device> cpu_device() { return std::make_unique<CpuDevice>(Place{}); }

}  // namespace fastrnn

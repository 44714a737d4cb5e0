// The kernels of csrc/cuda built for the host, and a device of them for tensors on the CPU: with ops.cpp, device.cpp
// and scan_step.cpp this is the pass of a GPU but for the machine, as torch.ops.fastrnn_cuda_on_host.
#include "cuda/device.h"
#include "cuda/step_kernels.inl"

namespace fastrnn {
namespace cuda {

// Threads have no order: odd ones first, from the last on, then even ones, and the groups from the last on.
template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue) {
  check_grid(items, groups);
  for (int64_t group = groups - 1; group >= 0; --group)
    for (int64_t odd : {1, 0})
      for (int64_t item = items - 1; item >= 0; --item)
        if (item % 2 == odd) kernel({item, group});
}

}  // namespace cuda

std::unique_ptr<Device> device_of(const Tensor&) {
  return std::make_unique<cuda::StepDevice>(Place{}, cuda::step_kernels(), nullptr);
}

}  // namespace fastrnn

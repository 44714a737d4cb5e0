// The devices of this build.
#include "device.h"

#if defined(FASTRNN_CUDA)
#include "cuda/current.h"
#endif

namespace fastrnn {

std::unique_ptr<Device> cpu_device();

std::unique_ptr<Device> device_of([[maybe_unused]] const Tensor& input) {
#if defined(FASTRNN_CUDA)
  if (input.device().type() == DeviceType::CUDA) return cuda::current_device(input.device().index());
#endif
  return cpu_device();
}

}  // namespace fastrnn

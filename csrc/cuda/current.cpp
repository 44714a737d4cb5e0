#include "current.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "device.h"

namespace fastrnn::cuda {
namespace {

// torch's current stream. The function lies in libtorch_cuda, which a torch for the CPU does not have: found in the
// library that is loaded, so that the extension loads there too.
Queue current_stream(int32_t index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "fastrnn: this torch has no CUDA: libtorch_cuda is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(index, &stream));
  return stream;
}

int gpu_major(int32_t index) {
  int major = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  STD_TORCH_CHECK(error == cudaSuccess, "fastrnn: the GPU does not say what it is: ", cudaGetErrorString(error));
  return major;
}

// Makes a GPU the current one and, when it goes, the one before.
struct CurrentGpu {
  torch::stable::accelerator::DeviceGuard guard;
};

class Gpu final : CurrentGpu, public KernelDevice {
 public:
  explicit Gpu(int32_t index)
      : CurrentGpu{torch::stable::accelerator::DeviceGuard(index)},
        KernelDevice({DeviceType::CUDA, index}, step_kernels(), block_kernels(), current_stream(index),
                     gpu_major(index)) {}
};

}  // namespace

intptr_t new_stream(int32_t index) {
  const CurrentGpu gpu{torch::stable::accelerator::DeviceGuard(index)};
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  STD_TORCH_CHECK(error == cudaSuccess, "fastrnn: no stream could be made: ", cudaGetErrorString(error));
  return reinterpret_cast<intptr_t>(stream);
}

std::unique_ptr<Device> current_device(int32_t index) { return std::make_unique<Gpu>(index); }

}  // namespace fastrnn::cuda

#include "current.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <mutex>

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

GpuLimits limits_of(int32_t index) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
    STD_TORCH_CHECK(error == cudaSuccess, "fastrnn: the GPU does not say what it is: ", cudaGetErrorString(error));
    return value;
  };
  GpuLimits gpu;
  gpu.major = ask(cudaDevAttrComputeCapabilityMajor), gpu.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  gpu.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  gpu.together = ask(cudaDevAttrCooperativeLaunch) != 0;
  return gpu;
}

// A word of the host that every GPU can write to.
uint32_t* new_word() {
  const auto check = [](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is told here
    STD_TORCH_CHECK(false, "fastrnn: no memory of the host for reports: ", cudaGetErrorString(error));
  };
  void* memory = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // somebody may be recording, whom this does not concern
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  const cudaError_t error = cudaHostAlloc(&memory, sizeof(uint32_t), cudaHostAllocPortable | cudaHostAllocMapped);
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  check(error);
  return new (memory) uint32_t(0);
}

// Made once, when a grid first runs, for the life of the process.
uint32_t* report(bool make) {
  static std::atomic<uint32_t*> word{nullptr};
  static std::mutex making;
  if (word || !make) return word;
  const std::lock_guard<std::mutex> lock(making);
  if (!word) word = new_word();
  return word;
}

// Makes a GPU the current one and, when it goes, the one before.
struct CurrentGpu {
  torch::stable::accelerator::DeviceGuard guard;
};

class Gpu final : CurrentGpu, public KernelDevice {
 public:
  explicit Gpu(int32_t index)
      : CurrentGpu{torch::stable::accelerator::DeviceGuard(index)},
        KernelDevice({DeviceType::CUDA, index}, step_kernels(), block_kernels(), grid_kernels(), current_stream(index),
                     limits_of(index), report) {}
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

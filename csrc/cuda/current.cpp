#include "current.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdlib>

#include "device.h"

namespace fastrnn::cuda {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastrnn: ", what, ": ", cudaGetErrorString(error));
}

// torch's current stream. The function lies in libtorch_cuda, which a torch for the CPU does not have: found by name,
// so that the extension loads there too.
Queue current_stream(int32_t index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function =
      reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(function, "fastrnn: this torch has no CUDA: aoti_torch_get_current_cuda_stream is missing");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(index, &stream));
  return stream;
}

// Makes a GPU the current one and, when it goes, the one before.
class CurrentGpu {
 public:
  explicit CurrentGpu(int32_t index) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
  }
  CurrentGpu(const CurrentGpu&) = delete;
  ~CurrentGpu() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// FASTRNN_CUDA_KERNEL asks for kernels; there is one kind in this version.
void check_request() {
  const char* const asked = std::getenv("FASTRNN_CUDA_KERNEL");
  const std::string name = asked && *asked ? asked : "auto";
  STD_TORCH_CHECK(name == "auto" || name == "step", "fastrnn: FASTRNN_CUDA_KERNEL=", name,
                  " cannot be met: this version has auto and step");
}

class Gpu final : CurrentGpu, public StepDevice {
 public:
  explicit Gpu(int32_t index)
      : CurrentGpu(index), StepDevice({DeviceType::CUDA, index}, step_kernels(), current_stream(index)) {
    check_request();
  }
};

}  // namespace

std::unique_ptr<Device> current_device(int32_t index) { return std::make_unique<Gpu>(index); }

}  // namespace fastrnn::cuda

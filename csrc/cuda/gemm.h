// torch's matrix products on device memory: views of arrays, out = a b.
//
// float32 products follow torch.backends.cuda.matmul (TF32 or not). 16-bit ones are summed in float32, and may leave
// float32.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "../device.h"

namespace fastrnn::cuda {

inline int32_t dtype_code(ScalarType dtype) { return static_cast<int32_t>(dtype); }

// A tensor over memory that somebody else keeps; strides in elements.
inline Tensor view(const Array& array, int64_t offset, const Sizes& sizes, const Sizes& strides, const Place& place) {
  const int32_t device = place.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  char* const data = static_cast<char*>(array.data) + static_cast<size_t>(offset * item_size(array.dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                                         dtype_code(array.dtype), device, place.index, &handle));
  return Tensor(handle);
}

// out = a b, matrices [rows, columns], or batches of them. a and b of one dtype, out of it or of its compute dtype.
inline void gemm(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (out.numel() == 0) return;
  const bool widens = out.scalar_type() != a.scalar_type();
  const char* const name = out.dim() == 3 ? "aten::bmm" : "aten::mm";
  if (widens && out.device().type() == DeviceType::CPU)  // there is no such product on the CPU
    return gemm(out, torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()));
  std::array<StableIValue, 4> stack = {torch::stable::detail::from(a), torch::stable::detail::from(b)};
  if (widens) stack[2] = torch::stable::detail::from(out.scalar_type());
  stack[widens ? 3 : 2] = torch::stable::detail::from(out);
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, widens ? "dtype_out" : "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // frees the handle
}

}  // namespace fastrnn::cuda

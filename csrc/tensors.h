// Tensors of torch's stable ABI: allocation, checks of what lies behind them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "huge_pages.h"
#include "scan.h"

namespace fastrnn {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(static_cast<int64_t>(i));
  return sizes;
}

inline int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Long ? 8
         : dtype == ScalarType::Float                             ? 4
         : dtype == ScalarType::Char || dtype == ScalarType::Byte ? 1
                                                                  : 2;
}
inline ScalarType compute_dtype(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// While set, every tensor made here on the CPU begins as NaN (0xFF in every byte): for tests, which then see what was
// not written.
inline std::atomic<bool>& poison() {
  static std::atomic<bool> on{false};
  return on;
}

// Where a tensor lies.
struct Place {
  DeviceType type = DeviceType::CPU;
  int32_t index = 0;

  bool is_cpu() const { return type == DeviceType::CPU; }
  bool holds(const Tensor& t) const {
    const torch::stable::Device device = t.device();
    return device.type() == type && (is_cpu() || device.index() == index);
  }
};

inline std::string text(const Place& place) {
  return place.is_cpu() ? "the CPU" : "cuda:" + std::to_string(place.index);
}

// Before the first use of new memory.
inline void prepare_memory(void* data, size_t bytes) {
  if (bytes >= kHugePage) advise_huge_pages(data, bytes);
  if (poison() && bytes > 0) std::memset(data, 0xFF, bytes);
}

// A new contiguous tensor.
inline Tensor make(const Sizes& sizes, ScalarType dtype, const Place& place = {}) {
  Sizes strides(sizes.size());
  int64_t numel = 1;
  for (size_t i = sizes.size(); i-- > 0;) strides[i] = numel, numel *= sizes[i];
  const int32_t type = dtype == ScalarType::Double     ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Float    ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                       : aoti_torch_dtype_uint8();
  const int32_t device = place.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), type, device, place.index, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "fastrnn: out of memory: no tensor of shape ", text(sizes),
                  " could be made on ", text(place));
  Tensor t(handle);
  const size_t bytes = static_cast<size_t>(dtype == ScalarType::Byte ? numel : numel * item_size(dtype));
  if (place.is_cpu()) prepare_memory(t.mutable_data_ptr(), bytes);
  return t;
}

// The elements of a tensor, or of an array in scratch memory.
struct Array {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  Array() = default;
  Array(void* elements, ScalarType type) : data(elements), dtype(type) {}
  Array(const Tensor& t) : data(const_cast<void*>(t.const_data_ptr())), dtype(t.scalar_type()) {}
};

inline int64_t storage_bytes(const Tensor& t) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

// Whether the storage of a tensor holds its elements: it can be cut short behind the tensor's back (storage.resize_, as
// FSDP frees parameters).
inline bool storage_suffices(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = 0;  // element
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &last));
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return (last + 1) * item_size(t.scalar_type()) <= storage_bytes(t);
}

inline void check_storage(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(storage_suffices(t), "fastrnn: the storage of ", name, " holds ", storage_bytes(t),
                  " bytes, fewer than its ", t.numel(), " elements");
}

inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  check_storage(t, "an argument");
  return torch::stable::contiguous(t);
}
inline OptionalTensor as_contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

// A tensor of these sizes and dtype in this place, contiguous.
inline void check(const Tensor& t, const char* name, const Sizes& sizes, ScalarType dtype, const Place& place = {}) {
  STD_TORCH_CHECK(place.holds(t), "fastrnn: ", name, " must be on ", text(place));
  STD_TORCH_CHECK(t.scalar_type() == dtype, "fastrnn: ", name,
                  " must have the dtype of the input (cells: its compute dtype)");
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(same, "fastrnn: ", name, " must have shape ", text(sizes), ", got ", text(sizes_of(t)));
  STD_TORCH_CHECK(t.is_contiguous(), "fastrnn: ", name, " must be contiguous");
  check_storage(t, name);
}

}  // namespace fastrnn

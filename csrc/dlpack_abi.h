// The part of DLPack's binary interface (version 1, minor 3 and later) that fastrnn uses: torch's own header of it is
// not for extensions on the stable ABI. Field by field as the specification orders them: https://dmlc.github.io/dlpack
#pragma once

#include <cstdint>

namespace fastrnn::dlpack {

constexpr uint32_t kMajorVersion = 1, kMinorVersion = 3;
constexpr int32_t kCpu = 1;                 // device type
constexpr uint8_t kFloat = 2, kBfloat = 4;  // codes of element types

struct Version {
  uint32_t major, minor;
};

struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  ElementType type;
  int64_t *sizes, *strides;  // [dim] each, in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  TensorView tensor;
};

// The functions that a type of tensors offers as `__dlpack_c_exchange_api__`; each returns 0, or -1 with an error set.
struct Exchange {
  using SetError = void (*)(void* context, const char* kind, const char* message);

  Version version;
  Exchange* previous;
  int (*allocate)(TensorView* like, ManagedTensor** made, void* error_context, SetError set_error);
  int (*manage)(void* python_object, ManagedTensor** made);
  int (*to_python)(ManagedTensor* taken, void** python_object);
  int (*view)(void* python_object, TensorView* found);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

constexpr char kExchangeAttribute[] = "__dlpack_c_exchange_api__", kExchangeCapsule[] = "dlpack_exchange_api";

}  // namespace fastrnn::dlpack

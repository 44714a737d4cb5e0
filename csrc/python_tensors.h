// What the tensors of Python hold, and new ones for Python, at a smaller cost than an operator's arguments and results.
//
// A tensor is reached through `_cdata`, the address of its implementation: torch's Tensor, and so what a handle of the
// stable ABI points to, is that address and nothing else, which the constructor makes sure of. New tensors come through
// the exchange functions of DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "dlpack_abi.h"
#include "step.h"

namespace fastrnn {

namespace py = pybind11;

class PythonTensors {
 public:
  PythonTensors(py::type tensor, py::type parameter)
      : tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_(tensor_.attr("is_neg")),
        contiguous_(tensor_.attr("contiguous")) {
    const py::object capsule = tensor_.attr(dlpack::kExchangeAttribute);
    exchange_ = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
    if (!exchange_) throw py::error_already_set();
    const dlpack::Version version = exchange_->version;
    if (version.major != dlpack::kMajorVersion || version.minor < dlpack::kMinorVersion || !exchange_->view)
      throw std::runtime_error("fastrnn: torch's exchange functions are not those of DLPack 1.3");
    check_addresses();
  }

  // Whether it is a torch.Tensor and of no subclass.
  bool is_tensor(const py::handle& object) const { return type_of(object) == tensor_.ptr(); }

  // What a tensor of at most 3 dimensions holds. False where it is no tensor, of a subclass other than Parameter, not
  // on the CPU, not dense, not contiguous, empty, negated when it is read, or larger than its storage.
  bool find(const py::handle& object, TensorView& found) const {
    const Layout layout = look(object, found);
    return layout == Layout::kContiguous;
  }

  // The same, and of a tensor that is not contiguous its copy, which `kept` keeps.
  bool find_or_copy(const py::handle& object, TensorView& found, py::object& kept) const {
    const Layout layout = look(object, found);
    if (layout != Layout::kStrided) return layout == Layout::kContiguous;
    kept = call(contiguous_, object);
    return find(kept, found);
  }

  // A new contiguous tensor on the CPU.
  py::object make(const Shape& shape, ScalarType dtype, TensorView& made) const {
    made = {nullptr, dtype, shape};
    dlpack::TensorView like{};
    like.device_type = dlpack::kCpu;
    like.dim = static_cast<int32_t>(shape.dim);
    like.sizes = made.shape.sizes;
    const uint8_t code = dtype == ScalarType::BFloat16 ? dlpack::kBfloat : dlpack::kFloat;
    like.type = {code, static_cast<uint8_t>(8 * item_size(dtype)), 1};
    const auto set_error = [](void*, const char*, const char* message) {
      const py::gil_scoped_acquire acquire;
      PyErr_SetString(PyExc_RuntimeError, message);
    };
    dlpack::ManagedTensor* managed = nullptr;
    if (exchange_->allocate(&like, &managed, nullptr, set_error) != 0) throw py::error_already_set();
    made.data = managed->tensor.data;
    prepare_memory(made.data, static_cast<size_t>(shape.numel() * item_size(dtype)));
    void* object = nullptr;
    if (exchange_->to_python(managed, &object) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  }

 private:
  enum class Layout { kOther, kStrided, kContiguous };

  static PyObject* type_of(const py::handle& object) { return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())); }
  static py::object checked(PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
  }
  static py::object call(const py::handle& function, const py::handle& argument) {
    PyObject* const arguments[] = {argument.ptr()};
    return checked(PyObject_Vectorcall(function.ptr(), arguments, 1, nullptr));
  }

  void* implementation(const py::handle& object) const {
    const py::object address = checked(PyObject_GetAttr(object.ptr(), cdata_.ptr()));
    void* const found = PyLong_AsVoidPtr(address.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  Layout look(const py::handle& object, TensorView& found) const {
    if (type_of(object) != tensor_.ptr() && type_of(object) != parameter_.ptr()) return Layout::kOther;
    if (call(is_neg_, object).ptr() != Py_False) return Layout::kOther;
    void* address = implementation(object);
    const AtenTensorHandle handle = reinterpret_cast<AtenTensorHandle>(&address);
    int32_t device, layout, dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    if (device != aoti_torch_device_type_cpu() || layout != aoti_torch_layout_strided() ||
        !take_dtype(dtype, found.dtype))
      return Layout::kOther;
    int64_t *sizes, *strides, offset, bytes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &found.shape.dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    if (found.shape.dim < 1 || found.shape.dim > 3) return Layout::kOther;
    int64_t numel = 1;
    bool is_contiguous = true;
    for (int64_t i = found.shape.dim; i-- > 0; numel *= sizes[i]) {
      found.shape.sizes[i] = sizes[i];
      is_contiguous = is_contiguous && (sizes[i] == 1 || strides[i] == numel);
    }
    if (numel == 0) return Layout::kOther;
    if (!is_contiguous) return Layout::kStrided;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    if ((offset + numel) * item_size(found.dtype) > bytes) return Layout::kOther;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &found.data));
    return found.data ? Layout::kContiguous : Layout::kOther;
  }

  static bool take_dtype(int32_t dtype, ScalarType& found) {
    for (const ScalarType known :
         {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half, ScalarType::Char})
      if (dtype == static_cast<int32_t>(known)) {
        found = known;
        return true;
      }
    return false;
  }

  void check_addresses() const {
    TensorView made, found;
    const py::object object = make({2, {3, 5}}, ScalarType::Double, made);
    dlpack::TensorView expected;
    if (exchange_->view(object.ptr(), &expected) != 0) throw py::error_already_set();
    if (!find(object, found) || found.data != expected.data || found.dtype != made.dtype ||
        !(found.shape == made.shape))
      throw std::runtime_error("fastrnn: a torch.Tensor is not where its _cdata says");
  }

  const py::type tensor_, parameter_;
  const py::object is_neg_, contiguous_;
  const py::str cdata_{"_cdata"};
  const dlpack::Exchange* exchange_;
};

}  // namespace fastrnn

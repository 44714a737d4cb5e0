// What the tensors of Python hold, and new ones for Python, at a smaller cost than an operator's arguments and results.
//
// A tensor is reached through `_cdata`, the address of its implementation: torch's Tensor, and so what a handle of the
// stable ABI points to, is that address and nothing else, which the constructor makes sure of.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>

#include "step.h"

namespace fastrnn {

namespace py = pybind11;

class PythonTensors {
 public:
  PythonTensors(py::type tensor, py::type parameter)
      : tensor_(std::move(tensor)),
        parameter_(std::move(parameter)),
        is_neg_(tensor_.attr("is_neg")),
        contiguous_(tensor_.attr("contiguous")),
        new_empty_(tensor_.attr("new_empty")),
        empty_like_(py::module_::import("torch").attr("empty_like")),
        float32_(py::module_::import("torch").attr("float32")),
        dtype_name_(py::make_tuple("dtype")) {
    check_addresses(py::module_::import("torch").attr("empty")(3, 5));
  }

  // Whether it is a torch.Tensor and of no subclass.
  bool is_tensor(const py::handle& object) const { return type_of(object) == tensor_.ptr(); }

  enum class Layout { kOther, kStrided, kContiguous };

  // What a tensor of at most 3 dimensions holds. kOther where it is no tensor, of a subclass other than Parameter, not
  // on the CPU, not dense, empty, negated when it is read, or larger than its storage; kStrided (shape and dtype are
  // found) where it is not contiguous. The caller has a reference to it: this may let other threads run.
  Layout find(const py::handle& object, TensorView& found) const { return find(object, found, kElements); }
  // The same of int64 only.
  Layout find_index(const py::handle& object, TensorView& found) const { return find(object, found, kIndexes); }

  py::object contiguous(const py::handle& object) const { return call(contiguous_, object); }

  // A new contiguous tensor like another one, which is contiguous.
  py::object make_like(const py::handle& other, const TensorView& view, TensorView& made) const {
    return prepared(call(empty_like_, other), view.shape, view.dtype, made);
  }
  // A new contiguous tensor of another shape, and of the dtype of `other` or float32.
  py::object make(const py::handle& other, ScalarType dtype_of_other, const Shape& shape, ScalarType dtype,
                  TensorView& made) const {
    py::tuple sizes(static_cast<size_t>(shape.dim));
    for (int64_t i = 0; i < shape.dim; ++i) sizes[static_cast<size_t>(i)] = py::int_(shape.sizes[i]);
    PyObject* const arguments[] = {other.ptr(), sizes.ptr(), float32_.ptr()};
    if (dtype == dtype_of_other)
      return prepared(checked(PyObject_Vectorcall(new_empty_.ptr(), arguments, 2, nullptr)), shape, dtype, made);
    if (dtype != ScalarType::Float) throw std::logic_error("fastrnn: new tensors are as another one, or float32");
    return prepared(checked(PyObject_Vectorcall(new_empty_.ptr(), arguments, 2, dtype_name_.ptr())), shape, dtype,
                    made);
  }

 private:
  static constexpr std::array kElements{ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half,
                                        ScalarType::Char};
  static constexpr std::array kIndexes{ScalarType::Long};

  template <class Dtypes>
  Layout find(const py::handle& object, TensorView& found, const Dtypes& dtypes) const {
    if (type_of(object) != tensor_.ptr() && type_of(object) != parameter_.ptr()) return Layout::kOther;
    if (call(is_neg_, object).ptr() != Py_False) return Layout::kOther;
    void* address = implementation(object);
    const AtenTensorHandle handle = reinterpret_cast<AtenTensorHandle>(&address);
    int32_t device, layout, dtype;
    int64_t *sizes, *strides, offset, bytes;
    if (aoti_torch_get_device_type(handle, &device) || aoti_torch_get_layout(handle, &layout) ||
        aoti_torch_get_dtype(handle, &dtype) || device != aoti_torch_device_type_cpu() ||
        layout != aoti_torch_layout_strided() || !take_dtype(dtype, dtypes, found.dtype))
      return Layout::kOther;
    int64_t& dim = found.shape.dim;
    if (aoti_torch_get_dim(handle, &dim) || dim < 1 || dim > 3 || aoti_torch_get_sizes(handle, &sizes) ||
        aoti_torch_get_strides(handle, &strides))
      return Layout::kOther;
    int64_t numel = 1;
    bool is_contiguous = true;
    for (int64_t i = dim; i-- > 0; numel *= sizes[i]) {
      found.shape.sizes[i] = sizes[i];
      is_contiguous = is_contiguous && (sizes[i] == 1 || strides[i] == numel);
    }
    if (numel == 0) return Layout::kOther;
    if (!is_contiguous) return Layout::kStrided;
    if (aoti_torch_get_storage_offset(handle, &offset) || aoti_torch_get_storage_size(handle, &bytes) ||
        (offset + numel) * item_size(found.dtype) > bytes || aoti_torch_get_data_ptr(handle, &found.data))
      return Layout::kOther;
    return found.data ? Layout::kContiguous : Layout::kOther;
  }

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

  // A new tensor that nobody else has.
  py::object prepared(py::object tensor, const Shape& shape, ScalarType dtype, TensorView& made) const {
    void* address = implementation(tensor);
    made = {nullptr, dtype, shape};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(&address), &made.data));
    prepare_memory(made.data, static_cast<size_t>(shape.numel() * item_size(dtype)));
    return tensor;
  }

  template <class Dtypes>
  static bool take_dtype(int32_t dtype, const Dtypes& dtypes, ScalarType& found) {
    for (const ScalarType known : dtypes)
      if (dtype == static_cast<int32_t>(known)) {
        found = known;
        return true;
      }
    return false;
  }

  void check_addresses(const py::object& tensor) const {
    TensorView found;
    if (find(tensor, found) != Layout::kContiguous || !(found.shape == Shape{2, {3, 5}}) ||
        reinterpret_cast<uintptr_t>(found.data) != tensor.attr("data_ptr")().cast<uintptr_t>())
      throw std::runtime_error("fastrnn: a torch.Tensor is not where its _cdata says");
  }

  const py::type tensor_, parameter_;
  const py::object is_neg_, contiguous_, new_empty_, empty_like_, float32_;
  const py::tuple dtype_name_;
  const py::str cdata_{"_cdata"};
};

}  // namespace fastrnn

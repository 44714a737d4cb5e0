// _C.select_rows, which lengths.py calls.
#include "python_parts.h"
#include "python_tensors.h"
#include "rows.h"

namespace fastrnn {
namespace {

// rows [M, n, width] or [n, width] in the order of an index [J], and zeros where it is n: a new tensor, in large pages;
// None where the tensors are of a kind that is not read here. Knows nothing of gradients.
py::object selected(const PythonTensors& tensors, const py::object& rows, const py::object& index) {
  TensorView from, order, made;
  if (tensors.find(rows, from) != PythonTensors::Layout::kContiguous ||
      tensors.find_index(index, order) != PythonTensors::Layout::kContiguous || from.shape.dim < 2 ||
      order.shape.dim != 1)
    return py::none();
  const int64_t dim = from.shape.dim, J = order.shape.sizes[0];
  const int64_t n = from.shape.sizes[dim - 2], width = from.shape.sizes[dim - 1];
  Shape shape = from.shape;
  shape.sizes[dim - 2] = J;
  py::object result = tensors.make(rows, from.dtype, shape, from.dtype, made);
  bool is_inside;
  {
    const py::gil_scoped_release release;
    is_inside = select_rows(static_cast<const char*>(from.data), dim == 3 ? from.shape.sizes[0] : 1, n,
                            static_cast<const int64_t*>(order.data), J,
                            static_cast<size_t>(width * item_size(from.dtype)), static_cast<char*>(made.data));
  }
  if (!is_inside) throw py::index_error("fastrnn: an index is not from 0 to " + std::to_string(n));
  return result;
}

}  // namespace

void bind_rows(py::module_& m) { m.def("select_rows", &selected); }

}  // namespace fastrnn

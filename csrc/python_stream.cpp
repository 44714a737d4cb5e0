// What a call asks of Python before and after its kernels, in C++: fastrnn/stream.py, which falls back to itself
// wherever this answers None.
#include "python_parts.h"

#include <pybind11/stl.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "python_tensors.h"
#include "step.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// Whether a call is on the native kernels and nothing else: no other backend asked for, no autocast, transform,
// tracing, mode or forward-mode derivative. Each condition is a function of no arguments and what it must return.
class PlainCalls {
 public:
  PlainCalls(py::list conditions, py::object scoped_backend, py::dict backends, py::module_ forward_ad)
      : scoped_(std::move(scoped_backend)), backends_(std::move(backends)), forward_ad_(std::move(forward_ad)) {
    for (const py::handle entry : conditions) {
      const py::tuple pair = py::reinterpret_borrow<py::tuple>(entry);
      conditions_.emplace_back(pair[0], pair[1]);
    }
  }

  bool holds() const {
    PyObject* scoped = nullptr;
    if (PyContextVar_Get(scoped_.ptr(), nullptr, &scoped) < 0) throw py::error_already_set();
    const py::object in_scope = py::reinterpret_steal<py::object>(scoped);
    const bool is_scoped = in_scope && !in_scope.is_none();
    const py::handle backend = is_scoped ? py::handle(in_scope) : item(backends_, default_name_);
    if (!is_equal(backend, auto_) && !is_equal(backend, native_)) return false;
    for (const auto& [function, expected] : conditions_) {
      const py::object found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function.ptr()));
      if (!found) throw py::error_already_set();
      if (!is_equal(found, expected)) return false;
    }
    return forward_ad_.attr(level_name_).cast<int64_t>() < 0;
  }

  // The value of a key, borrowed; null where there is none.
  static py::handle item(const py::handle& dict, const py::handle& key) {
    PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

  static bool is_equal(const py::handle& a, const py::handle& b) {
    if (!a || !b) return a.ptr() == b.ptr();
    const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal;
  }

 private:
  std::vector<std::pair<py::object, py::object>> conditions_;
  const py::object scoped_;
  const py::dict backends_;  // the globals that hold `_default`
  const py::object forward_ad_;
  const py::str default_name_{"_default"}, level_name_{"_current_level"}, auto_{"auto"}, native_{"native"};
};

// The steps of one module over weights that lie where they lie. Knows their names and keeps none of them.
class DirectCall {
 public:
  DirectCall(const PlainCalls& plain, const PythonTensors& tensors, py::dict description,
             std::vector<std::pair<bool, py::object>> weights, const StepKind& kind, py::object record)
      : plain_(plain),
        tensors_(tensors),
        names_(std::move(weights)),
        kind_(kind),
        has_c_(kind.has_c()),
        record_(std::move(record)),
        cell_name_(kCells[static_cast<int>(kind.cell)].name) {
    for (const auto& [name, value] : description)
      description_.emplace_back(py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(value));
  }

  // Output and new state of input [B, I], [I] or [T, B, I], the output [B, T, P] if so asked; None where the general
  // path has to run, or to say what is wrong. attributes: the module's.
  py::object call(const py::dict& attributes, const py::handle& input, const py::handle& state, const py::handle& out,
                  bool batch_first) const {
    if (!tensors_.is_tensor(input) || !plain_.holds() || !is_current(attributes) || drops_out(attributes))
      return py::none();
    Borrowed borrowed;
    Operands of;
    py::object x = borrow(input), h = borrow(state), c = none_, h_n = borrow(out), c_n = none_;
    if (has_c_ && !(take_pair(state, h, c) && take_pair(out, h_n, c_n))) return py::none();
    if (!find_weights(attributes, borrowed)) return py::none();
    const py::tuple leaves = leaves_of(x, h, c, borrowed.kept);
    const bool with_gradients = aoti_torch_grad_mode_is_enabled();
    if (with_gradients && !out.is_none()) return py::none();  // `out` may be part of a graph
    const bool is_recorded = with_gradients && any_requires_grad(leaves);
    TensorView h_out, c_out;
    if (!find_input(x, of.x) || (is_recorded && !may_record(of.x))) return py::none();
    const Shape h_shape = state_shape(of.x.shape, kind_.P), c_shape = state_shape(of.x.shape, kind_.H);
    if (!find_state(h, h_shape, of.h) || !find_state(c, c_shape, of.c) || !find_out(h_n, h_out) ||
        !find_out(c_n, c_out))
      return py::none();
    StepCall steps;
    if (!steps.take(kind_, borrowed.weights, of.x, of.h, of.c)) return py::none();
    if (!out.is_none()) {
      if (!steps.may_write(h_out, c_out)) return py::none();
    } else {
      h_n = make(h, of.h, x, h_shape, steps.dtype(), h_out);
      if (has_c_) c_n = make(c, of.c, x, c_shape, steps.dtype(), c_out);
    }
    TensorView y, cells, saved;
    py::object output = make(x, of.x, x, steps.output_shape(), steps.dtype(), y), all_cells, all_saved;
    if (is_recorded) {
      all_cells = tensors_.make(x, of.x.dtype, steps.cells_shape(), steps.cells_dtype(), cells);
      all_saved = tensors_.make(x, of.x.dtype, steps.saved_shape(), steps.dtype(), saved);
    }
    {
      const py::gil_scoped_release release;
      steps.run(y, h_out, c_out, cells, saved);
    }
    if (is_recorded) {
      const py::tuple results =
          record_(cell_name_, batch_first, py::make_tuple(output, h_n, c_n, all_cells, all_saved), leaves);
      output = results[0], h_n = results[1], c_n = results[2];
    } else if (batch_first) {
      output = output.attr(transpose_name_)(0, 1);  // in place: no view, as torch.nn's
    }
    return pair(output, out.is_none() ? has_c_ ? pair(h_n, c_n) : h_n : borrow(out));
  }

 private:
  using Layout = PythonTensors::Layout;

  // The weights of a call, and references to them: another thread may drop them meanwhile.
  struct Borrowed {
    std::vector<TensorView> weights;
    std::vector<py::object> kept;
  };
  struct Operands {
    TensorView x, h, c;
  };

  static py::object borrow(const py::handle& object) { return py::reinterpret_borrow<py::object>(object); }

  // Whether the gradients of a call can be those of one call of the operator.
  bool may_record(const TensorView& input) const { return kind_.L == 1 && !kind_.quantized && input.shape.dim == 3; }

  // (input, h0, c0, *weights), in the order of autograd.py.
  static py::tuple leaves_of(const py::object& x, const py::object& h, const py::object& c,
                             const std::vector<py::object>& weights) {
    py::tuple leaves(3 + weights.size());
    leaves[0] = x, leaves[1] = h, leaves[2] = c;
    for (size_t i = 0; i < weights.size(); ++i) leaves[3 + i] = weights[i];
    return leaves;
  }

  bool any_requires_grad(const py::tuple& leaves) const {
    for (const py::handle leaf : leaves)
      if (!leaf.is_none() && is_true(leaf.attr(requires_grad_name_))) return true;
    return false;
  }

  // [L, B, width], or [L, width] beside input [I].
  Shape state_shape(const Shape& input, int64_t width) const {
    if (input.dim == 1) return {2, {kind_.L, width}};
    return {3, {kind_.L, input.sizes[input.dim - 2], width}};
  }

  // What an argument holds; one that is not contiguous is replaced by its copy.
  bool find_input(py::object& input, TensorView& found) const {
    const Layout layout = tensors_.find(input, found);
    if (layout != Layout::kStrided || found.shape.sizes[found.shape.dim - 1] != kind_.I)
      return layout == Layout::kContiguous;
    return find_copy(input, found);
  }

  // The same; nothing for None.
  bool find_state(py::object& state, const Shape& shape, TensorView& found) const {
    if (state.is_none()) return true;
    const Layout layout = tensors_.find(state, found);
    if (layout != Layout::kStrided || !(found.shape == shape)) return layout == Layout::kContiguous;
    return find_copy(state, found);
  }

  bool find_copy(py::object& object, TensorView& found) const {
    object = tensors_.contiguous(object);
    return tensors_.find(object, found) == Layout::kContiguous;
  }

  bool find_out(const py::object& out, TensorView& found) const {
    return out.is_none() || tensors_.find(out, found) == Layout::kContiguous;
  }

  // A new contiguous tensor: like one of this shape and dtype, which is contiguous, if that is one.
  py::object make(const py::handle& like, const TensorView& view, const py::handle& input, const Shape& shape,
                  ScalarType dtype, TensorView& made) const {
    if (view.data && view.shape == shape && view.dtype == dtype) return tensors_.make_like(like, view, made);
    return tensors_.make(input, dtype, shape, dtype, made);
  }

  // Whether the module's attributes are what they were.
  bool is_current(const py::dict& attributes) const {
    for (const auto& [name, value] : description_)
      if (!PlainCalls::is_equal(PlainCalls::item(attributes, name), value)) return false;
    return true;
  }

  // The module's weights as they are now; false where one is not there or not simply right.
  bool find_weights(const py::dict& attributes, Borrowed& borrowed) const {
    const py::handle found_parameters = PlainCalls::item(attributes, parameters_name_);
    const py::handle found_buffers = PlainCalls::item(attributes, buffers_name_);
    if (!found_parameters || !found_buffers || !PyDict_Check(found_parameters.ptr()) ||
        !PyDict_Check(found_buffers.ptr()))
      return false;
    const py::object parameters = borrow(found_parameters), buffers = borrow(found_buffers);
    borrowed.weights.resize(names_.size());
    borrowed.kept.reserve(names_.size());
    for (size_t i = 0; i < names_.size(); ++i) {
      const auto& [is_parameter, name] = names_[i];
      const py::handle weight = PlainCalls::item(is_parameter ? parameters : buffers, name);
      if (!weight) return false;
      borrowed.kept.push_back(borrow(weight));
      if (tensors_.find(weight, borrowed.weights[i]) != Layout::kContiguous) return false;
    }
    return true;
  }

  bool drops_out(const py::dict& attributes) const {
    const py::handle dropout = PlainCalls::item(attributes, dropout_name_);
    return dropout && is_true(dropout) && is_true(PlainCalls::item(attributes, training_name_));
  }
  static bool is_true(const py::handle& value) {
    const int truth = value ? PyObject_IsTrue(value.ptr()) : 0;
    if (truth < 0) throw py::error_already_set();
    return truth;
  }

  // The halves of a state (h, c); of none, two of them.
  static bool take_pair(const py::handle& state, py::object& h, py::object& c) {
    if (state.is_none()) return true;
    if (!PyTuple_Check(state.ptr()) && !PyList_Check(state.ptr())) return false;
    if (PySequence_Fast_GET_SIZE(state.ptr()) != 2) return false;
    h = borrow(PySequence_Fast_GET_ITEM(state.ptr(), 0)), c = borrow(PySequence_Fast_GET_ITEM(state.ptr(), 1));
    return !h.is_none() && !c.is_none();
  }

  static py::object pair(const py::handle& first, const py::handle& second) {
    PyObject* const made = PyTuple_Pack(2, first.ptr(), second.ptr());
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  const PlainCalls& plain_;  // both kept alive by the binding
  const PythonTensors& tensors_;
  std::vector<std::pair<py::object, py::object>> description_;
  const std::vector<std::pair<bool, py::object>> names_;  // of the weights, and whether each is a parameter
  const StepKind kind_;
  const bool has_c_;
  const py::object record_;  // autograd.record
  const py::str cell_name_;
  const py::none none_;
  const py::str parameters_name_{"_parameters"}, buffers_name_{"_buffers"}, dropout_name_{"dropout"},
      training_name_{"training"}, requires_grad_name_{"requires_grad"}, transpose_name_{"transpose_"};
};

}  // namespace

void bind_stream(py::module_& m) {
  py::class_<PlainCalls>(m, "PlainCalls")
      .def(py::init<py::list, py::object, py::dict, py::module_>())
      .def("hold", &PlainCalls::holds);
  py::class_<PythonTensors>(m, "PythonTensors").def(py::init<py::type, py::type>());
  py::class_<StepKind>(m, "StepKind")
      .def(py::init([](const std::string& cell, int64_t L, int64_t I, int64_t H, int64_t P, bool bias, bool quantized) {
             return StepKind{cell_of(cell), L, I, H, P, bias, quantized};
           }),
           py::kw_only(), py::arg("cell"), py::arg("L"), py::arg("I"), py::arg("H"), py::arg("P"), py::arg("bias"),
           py::arg("quantized"));
  py::class_<DirectCall>(m, "DirectCall")
      .def(py::init<const PlainCalls&, const PythonTensors&, py::dict, std::vector<std::pair<bool, py::object>>,
                    const StepKind&, py::object>(),
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def("call", &DirectCall::call)
      // Copies and pickles of a module do without: None.
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
}

}  // namespace fastrnn

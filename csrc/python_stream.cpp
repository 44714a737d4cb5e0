// What a call without gradients asks of Python before its operator runs, in C++: fastrnn/stream.py, which falls back to
// itself wherever this answers None.
#include "python_stream.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>
#include <utility>
#include <vector>

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
    if (is_equal(backend, reference_)) return false;
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
  const py::str default_name_{"_default"}, level_name_{"_current_level"}, reference_{"reference"};
};

// The steps of one module over weights that lie where they lay.
class DirectCall {
 public:
  DirectCall(const PlainCalls& plain, py::object tensor_type, py::dict description, bool has_c, py::list held,
             py::object net, py::object step, py::object step_out)
      : plain_(plain),
        tensor_type_(std::move(tensor_type)),
        has_c_(has_c),
        net_(std::move(net)),
        step_(std::move(step)),
        step_out_(std::move(step_out)) {
    for (const auto& [name, value] : description)
      description_.emplace_back(py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(value));
    for (const py::handle entry : held) {
      const py::tuple weight = py::reinterpret_borrow<py::tuple>(entry);
      held_.push_back({weight[0].cast<bool>(), weight[1], weight[2]});
    }
  }

  // Output and new state of input [B, I], [I] or [T, B, I]; None where the general path has to run, or to say what is
  // wrong. attributes: the module's.
  py::object call(const py::dict& attributes, const py::handle& input, const py::handle& state,
                  const py::handle& out) const {
    if (aoti_torch_grad_mode_is_enabled() || reinterpret_cast<PyObject*>(Py_TYPE(input.ptr())) != tensor_type_.ptr() ||
        !plain_.holds() || !is_current(attributes) || drops_out(attributes))
      return py::none();
    py::handle h = state, c = none_, h_n = out, c_n = none_;
    if (has_c_ && !(take_pair(state, h, c) && take_pair(out, h_n, c_n))) return py::none();
    PyObject* const arguments[] = {net_.ptr(), input.ptr(), h.ptr(), c.ptr(), h_n.ptr(), c_n.ptr()};
    const py::object found =
        py::reinterpret_steal<py::object>(out.is_none() ? PyObject_Vectorcall(step_.ptr(), arguments, 4, nullptr)
                                                        : PyObject_Vectorcall(step_out_.ptr(), arguments, 6, nullptr));
    if (!found) return refused();
    if (!out.is_none()) return py::make_tuple(found, out);
    PyObject* const results = found.ptr();
    if (!PyTuple_Check(results) || PyTuple_GET_SIZE(results) != 3) return py::none();
    const py::handle output = PyTuple_GET_ITEM(results, 0), new_h = PyTuple_GET_ITEM(results, 1);
    if (!has_c_) return pair(output, new_h);
    return pair(output, pair(new_h, PyTuple_GET_ITEM(results, 2)));
  }

 private:
  struct Held {
    bool is_parameter;
    py::object name, tensor;
  };

  // Whether the module's attributes are what they were, and every weight the tensor it was.
  bool is_current(const py::dict& attributes) const {
    for (const auto& [name, value] : description_)
      if (!PlainCalls::is_equal(PlainCalls::item(attributes, name), value)) return false;
    const py::handle parameters = PlainCalls::item(attributes, parameters_name_);
    const py::handle buffers = PlainCalls::item(attributes, buffers_name_);
    if (!parameters || !buffers || !PyDict_Check(parameters.ptr()) || !PyDict_Check(buffers.ptr())) return false;
    for (const Held& weight : held_)
      if (PlainCalls::item(weight.is_parameter ? parameters : buffers, weight.name).ptr() != weight.tensor.ptr())
        return false;
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
  static bool take_pair(const py::handle& state, py::handle& h, py::handle& c) {
    if (state.is_none()) return true;
    if (!PyTuple_Check(state.ptr()) && !PyList_Check(state.ptr())) return false;
    if (PySequence_Fast_GET_SIZE(state.ptr()) != 2) return false;
    h = PySequence_Fast_GET_ITEM(state.ptr(), 0), c = PySequence_Fast_GET_ITEM(state.ptr(), 1);
    return !h.is_none() && !c.is_none();
  }

  static py::object pair(const py::handle& first, const py::handle& second) {
    PyObject* const made = PyTuple_Pack(2, first.ptr(), second.ptr());
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  // An argument was not simply right, or a weight has moved: the general path finds out which.
  static py::object refused() {
    for (PyObject* const kind : {PyExc_RuntimeError, PyExc_TypeError, PyExc_ValueError})
      if (PyErr_ExceptionMatches(kind)) {
        PyErr_Clear();
        return py::none();
      }
    throw py::error_already_set();
  }

  const PlainCalls& plain_;  // kept alive by the binding
  const py::object tensor_type_;
  const bool has_c_;
  std::vector<std::pair<py::object, py::object>> description_;
  std::vector<Held> held_;
  const py::object net_, step_, step_out_;
  const py::none none_;
  const py::str parameters_name_{"_parameters"}, buffers_name_{"_buffers"}, dropout_name_{"dropout"},
      training_name_{"training"};
};

}  // namespace

void bind_stream(py::module_& m) {
  py::class_<PlainCalls>(m, "PlainCalls")
      .def(py::init<py::list, py::object, py::dict, py::module_>())
      .def("hold", &PlainCalls::holds);
  py::class_<DirectCall>(m, "DirectCall")
      .def(py::init<const PlainCalls&, py::object, py::dict, bool, py::list, py::object, py::object, py::object>(),
           py::keep_alive<1, 2>())
      .def("call", &DirectCall::call);
}

}  // namespace fastrnn

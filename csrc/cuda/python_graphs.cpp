#include "python_graphs.h"

#include <stdexcept>
#include <utility>

#include "current.h"
#include "program.h"

namespace py = pybind11;

namespace fastrnn {
namespace {

// Calls Python, from any thread; its exceptions leave as C++ ones, which do not need Python's lock.
template <class F>
auto in_python(F f) {
  const py::gil_scoped_acquire lock;
  try {
    return f();
  } catch (const py::error_already_set& error) {
    throw std::runtime_error(error.what());
  }
}

class PythonProgram : public cuda::Program {
 public:
  explicit PythonProgram(py::object program) : program_(std::move(program)), replay_(program_.attr("replay")) {}
  ~PythonProgram() override {
    const py::gil_scoped_acquire lock;
    try {
      program_.attr("close")();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("fastrnn: a program is closed");
    }
    replay_ = program_ = py::object();
  }

  void run() override {
    in_python([&] { replay_(); });
  }

 private:
  py::object program_, replay_;
};

class PythonRecorder : public cuda::Recorder {
 public:
  PythonRecorder(py::object is_ready, py::object record, py::object product_settings, py::object allows_tf32)
      : is_ready_(std::move(is_ready)),
        record_(std::move(record)),
        product_settings_(std::move(product_settings)),
        allows_tf32_(std::move(allows_tf32)) {}

  bool is_ready() override {
    return in_python([&] { return is_ready_().cast<bool>(); });
  }
  std::unique_ptr<cuda::Program> record(const Steps& steps) override {
    return in_python([&]() -> std::unique_ptr<cuda::Program> {
      const py::cpp_function on_stream([&](intptr_t stream) {
        const py::gil_scoped_release unlock;
        steps(reinterpret_cast<cuda::Queue>(stream));
      });
      return std::make_unique<PythonProgram>(record_(on_stream));
    });
  }
  std::string product_settings() override {
    return in_python([&] { return product_settings_().cast<std::string>(); });
  }
  bool allows_tf32() override {
    return in_python([&] { return allows_tf32_().cast<bool>(); });
  }

 private:
  const py::object is_ready_, record_, product_settings_, allows_tf32_;
};

}  // namespace

void bind_graphs(py::module_& m) {
  m.def(
      "record_programs",
      [](py::object is_ready, py::object record, py::object product_settings, py::object allows_tf32) {
        cuda::set_recorder(std::make_unique<PythonRecorder>(std::move(is_ready), std::move(record),
                                                            std::move(product_settings), std::move(allows_tf32)));
      },
      py::kw_only(), py::arg("is_ready"), py::arg("record"), py::arg("product_settings"), py::arg("allows_tf32"));
  m.def("kept_programs", &cuda::kept_memories);
  m.def("release_programs", &cuda::release_memories, py::call_guard<py::gil_scoped_release>());
  m.def("new_stream", &cuda::new_stream, py::arg("device"));
}

}  // namespace fastrnn

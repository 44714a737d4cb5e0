// fastrnn._C: what the extension says of itself, and the step of a stream by addresses. No tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/scan_cpu.h"
#include "step.h"
#include "tensors.h"

#define FASTRNN_TEXT_(x) #x
#define FASTRNN_TEXT(x) FASTRNN_TEXT_(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Introspection of the native extension of fastrnn; importing it registers torch.ops.fastrnn.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FASTRNN_TEXT(FASTRNN_VERSION);
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    info["flags"] = FASTRNN_BUILD_FLAGS;
    info["torch"] = FASTRNN_BUILD_TORCH;
    info["torch_target"] = "2.10";
    info["sanitized"] =
#if defined(__SANITIZE_ADDRESS__)
        true;
#else
        false;
#endif
    return info;
  });
  m.def("cells", [] {
    py::dict cells;
    for (const fastrnn::CellInfo& cell : fastrnn::kCells) {
      py::dict entry;
      entry["gates"] = cell.gates;
      entry["saved"] = cell.saved;
      entry["own"] = cell.own;
      entry["has_c"] = cell.has_c;
      cells[cell.name] = entry;
    }
    return cells;
  });
  m.def("poison", [](bool on) { fastrnn::poison() = on; }, py::arg("on"));
  m.def("cpu_isas", &fastrnn::cpu_isas);
  py::class_<fastrnn::Step>(m, "Step")
      .def(py::init([](const std::string& cell, const std::string& dtype, const std::string& weight_type, int64_t I,
                       int64_t H, int64_t P, const std::vector<std::array<uintptr_t, 7>>& addresses) {
        std::vector<fastrnn::StepLayer> layers;
        for (const auto& l : addresses) layers.push_back({l[0], l[1], l[2], l[3], l[4], l[5], l[6]});
        return fastrnn::Step(cell, dtype, weight_type, I, H, P, std::move(layers));
      }))
      .def("run", &fastrnn::Step::run, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_isa", &fastrnn::cpu_isa);
  m.def("set_cpu_isa", &fastrnn::set_cpu_isa, py::arg("name"));
}

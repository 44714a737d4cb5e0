// fastrnn._C: what the extension says of itself; and from python_stream.cpp the short way to the operators of steps.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/scan_cpu.h"
#include "python_stream.h"
#include "tensors.h"

#define FASTRNN_TEXT_(x) #x
#define FASTRNN_TEXT(x) FASTRNN_TEXT_(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native extension of fastrnn; importing it registers torch.ops.fastrnn.";
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
#if defined(FASTRNN_CUDA)
    info["cuda"] = FASTRNN_CUDA;
#else
    info["cuda"] = "";
#endif
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
  m.def("cpu_isa", &fastrnn::cpu_isa);
  m.def("set_cpu_isa", &fastrnn::set_cpu_isa, py::arg("name"));
  fastrnn::bind_stream(m);
}

// fastrnn._C: what the extension says of itself; and of python_parts.h what takes tensors without an operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/scan_cpu.h"
#include "cuda/plan.h"
#include "problem.h"
#include "python_parts.h"

#if defined(FASTRNN_CUDA)
#include "cuda/python_graphs.h"
#endif

#define FASTRNN_TEXT_(x) #x
#define FASTRNN_TEXT(x) FASTRNN_TEXT_(x)

namespace py = pybind11;

namespace {

py::dict facts_of(const fastrnn::cuda::GpuFacts& gpu) {
  py::dict facts;
  facts["capability"] = py::make_tuple(gpu.major, gpu.minor);
  facts["multiprocessors"] = gpu.multiprocessors;
  facts["shared_bytes"] = gpu.shared_bytes;
  facts["register_bytes"] = gpu.register_bytes;
  return facts;
}

// The plan of a pass on a GPU of these facts.
py::dict plan(const std::string& cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t D, int64_t item_bytes,
              const py::dict& gpu, const std::string& kernel, bool persistent, bool tf32, bool backward) {
  const py::tuple capability = gpu["capability"];
  const fastrnn::cuda::GpuFacts facts = {
      "",
      capability[0].cast<int>(),
      capability[1].cast<int>(),
      gpu["multiprocessors"].cast<int>(),
      gpu["shared_bytes"].cast<int64_t>(),
      gpu["register_bytes"].cast<int64_t>(),
  };
  const int64_t compute_bytes = item_bytes == 8 ? 8 : 4;
  const fastrnn::cuda::Plan found = fastrnn::cuda::plan_pass(
      {fastrnn::cell_of(cell), T, B, I, H, D, item_bytes, compute_bytes, H, tf32, backward}, facts, kernel, persistent);
  py::dict result;
  result["kernel"] = found.kernel;
  result["why"] = found.why;
  result["against"] = found.against;
  result["weights"] = found.weights;
  result["units"] = found.units;
  result["threads"] = found.threads;
  result["blocks"] = found.blocks;
  result["chunk_steps"] = found.chunk_steps;
  result["launches"] = found.launches;
  return result;
}

}  // namespace

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
  m.def("gpus", [] {
    py::dict gpus;
    for (const fastrnn::cuda::GpuFacts& gpu : fastrnn::cuda::kGpus) gpus[gpu.name] = facts_of(gpu);
    return gpus;
  });
  m.def("plan", &plan, py::kw_only(), py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("D"), py::arg("item_bytes"), py::arg("gpu"), py::arg("kernel"), py::arg("persistent") = false,
        py::arg("tf32") = false, py::arg("backward") = false);
  m.def("poison", [](bool on) { fastrnn::poison() = on; }, py::arg("on"));
  m.def("cpu_isas", &fastrnn::cpu_isas);
  m.def("cpu_isa", &fastrnn::cpu_isa);
  m.def("set_cpu_isa", &fastrnn::set_cpu_isa, py::arg("name"));
  fastrnn::bind_stream(m);
  fastrnn::bind_rows(m);
#if defined(FASTRNN_CUDA)
  fastrnn::bind_graphs(m);
#endif
}

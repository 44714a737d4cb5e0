// Programs (program.h) that Python functions record: fastrnn/cuda_graphs.py.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_graphs(pybind11::module_& m);

}  // namespace fastrnn

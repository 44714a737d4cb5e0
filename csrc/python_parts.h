// The parts of python.cpp that take tensors: python_stream.cpp, python_rows.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_stream(pybind11::module_& m);
void bind_rows(pybind11::module_& m);

}  // namespace fastrnn

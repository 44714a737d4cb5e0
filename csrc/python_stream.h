// The part of python.cpp that calls: see python_stream.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastrnn {

void bind_stream(pybind11::module_& m);

}  // namespace fastrnn

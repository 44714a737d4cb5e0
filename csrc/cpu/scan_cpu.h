// The CPU pass as csrc/ops.cpp and csrc/python.cpp see it.
#pragma once

#include <string>
#include <vector>

#include "../scan.h"

namespace fastrnn {

// The instruction sets of this build that this CPU has, worst to best; and the one in use: the best, or the one named
// by FASTRNN_CPU_ISA when the library was loaded, or the last one set.
std::vector<std::string> cpu_isas();
std::string cpu_isa();
void set_cpu_isa(const std::string& name);  // throws std::invalid_argument

struct CpuKernels;
const CpuKernels& cpu_kernels();  // of the instruction set in use

// One pass over torch's threads.
void scan_cpu(const ScanArgs& args);
void scan_cpu(const ScanBackwardArgs& args);

}  // namespace fastrnn

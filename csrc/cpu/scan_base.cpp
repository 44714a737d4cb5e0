#define FASTRNN_ISA isa_base
#define FASTRNN_ISA_NAME "base"
#include "scan.inl"

namespace fastrnn {
const CpuKernels& kernels_base() { return isa_base::kernels(); }
}  // namespace fastrnn

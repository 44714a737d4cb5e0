#define FASTRNN_ISA isa_avx2
#define FASTRNN_ISA_NAME "avx2"
#include "scan.inl"

namespace fastrnn {
const CpuKernels& kernels_avx2() { return isa_avx2::kernels(); }
}  // namespace fastrnn

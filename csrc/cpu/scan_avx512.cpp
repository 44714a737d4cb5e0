#define FASTRNN_ISA isa_avx512
#define FASTRNN_ISA_NAME "avx512"
#include "scan.inl"

namespace fastrnn {
const CpuKernels& kernels_avx512() { return isa_avx512::kernels(); }
}  // namespace fastrnn

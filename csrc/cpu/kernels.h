// What one instruction set offers: the functions that scan.inl defines, built once for each set. scan.cpp chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scan.h"

namespace fastrnn {

// A pass = pack every block of weights (pack_blocks of them, in any order, in parallel), then run every group and
// range of rows (in any order, in parallel). Ranges of rows share nothing, and the result of a row does not depend on
// the range it is in: the number of threads never changes a bit.
template <class Args>
struct PassKernels {
  size_t (*scratch_bytes)(const ScanShape&);
  int64_t (*pack_blocks)(const ScanShape&);
  void (*pack)(const Args&, char* scratch, int64_t block);
  void (*rows)(const Args&, char* scratch, int64_t d, int64_t b_begin, int64_t b_end);
};

struct CpuKernels {
  const char* isa;
  PassKernels<ScanArgs> forward;
  PassKernels<ScanBackwardArgs> backward;
};

const CpuKernels& kernels_base();
#if defined(FASTRNN_X86)
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();
#endif

}  // namespace fastrnn

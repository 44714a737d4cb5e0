// What one instruction set offers: the functions that scan.inl defines, built once for each set. scan.cpp chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scan.h"
#include "team.h"

namespace fastrnn {

// What scan.cpp decided for a pass.
struct CpuPlan {
  bool packed;        // the recurrent weights are packed first; otherwise read where they lie
  bool packed_input;  // the same of the input weights (forward)
  int64_t members;    // threads that share the hidden units of one group; 1: rows are divided instead
  int64_t ranges;     // ranges of rows of one group
  int64_t chunk;      // steps whose input products are computed together (forward)
};

// What one thread runs: a range of rows of a group through all time steps; with a team all rows, and its share of
// the hidden units.
struct Share {
  int64_t d, b_begin, b_end;
  int64_t range;  // number of the range of rows
  int member = 0;
  Team* team = nullptr;
};

// A pass = pack every block of weights (pack_blocks of them, in any order, in parallel), then run every share (in any
// order, in parallel). Ranges of rows have nothing in common, and the result of a row and unit does not depend on the
// share it is in: the number of threads never changes a bit.
template <class Args>
struct PassKernels {
  size_t (*scratch_bytes)(const Args&, const CpuPlan&);
  int64_t (*pack_blocks)(const Args&, const CpuPlan&);
  int64_t (*unit_blocks)(const Args&);  // into how many parts the hidden units can be divided
  void (*pack)(const Args&, const CpuPlan&, char* scratch, int64_t block);
  void (*run)(const Args&, const CpuPlan&, char* scratch, const Share&);
};

constexpr int64_t kChunkRows = 48;  // rows of a chunk of steps whose input products are computed together
constexpr int64_t kSumRows = 64;    // rows of a partial sum

struct CpuKernels {
  const char* isa;
  PassKernels<ScanArgs> forward;
  PassKernels<ScanBackwardArgs> backward;
  // arrays.inl
  void (*to_float)(Dtype, const void* source, float* target, int64_t count);
  void (*from_float)(Dtype, const float* source, void* target, int64_t count);
  void (*add)(bool is_double, const void* source, void* target, int64_t count);
  void (*sum_rows)(bool is_double, const void* source, void* sums, int64_t rows, int64_t stride, int64_t begin,
                   int64_t end);
};

const CpuKernels& kernels_base();
#if defined(FASTRNN_X86)
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();
#endif

}  // namespace fastrnn

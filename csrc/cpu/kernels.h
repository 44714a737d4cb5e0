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
  int64_t slots;      // places for groups in scratch memory: one for each, or one that a thread uses for all of its own
  int64_t chunk;      // steps whose input products are computed together (forward): of all rows, or more of fewer rows
};

// What one thread runs: a range of rows of a group through all time steps; with a team all rows, and its share of
// the hidden units.
struct Share {
  int64_t d, slot;  // the group, and its place in the scratch memory
  int64_t b_begin, b_end;
  int64_t range;  // number of the range of rows
  int member = 0;
  Team* team = nullptr;
};

// A pass = of every group pack the weights (pack_blocks, in any order, in parallel), then run every share (in any
// order, in parallel); groups with the same place in scratch memory one after the other, each packed just before it
// runs. Ranges of rows have nothing in common, and the result of a row and unit does not depend on the
// share it is in: the number of threads never changes a bit.
template <class Args>
struct PassKernels {
  size_t (*scratch_bytes)(const Args&, const CpuPlan&);
  int64_t (*pack_blocks)(const Args&, const CpuPlan&);  // of one group
  int64_t (*unit_blocks)(const Args&);                  // into how many parts the hidden units can be divided
  void (*pack)(const Args&, const CpuPlan&, char* scratch, const Share&, int64_t block);
  void (*run)(const Args&, const CpuPlan&, char* scratch, const Share&);
};

constexpr int64_t kChunkRows = 48;  // rows, and most steps, of a chunk whose input products are computed together
constexpr int64_t kSumRows = 64;    // rows of a partial sum

// target [rows, columns] (+)= a [rows, K] * b [K, columns]; a and target in the compute dtype. Strides in elements.
struct ProductArgs {
  bool is_double;
  const void* a;
  int64_t a_row, a_k;  // between the rows of a, and between its columns; one of them is 1
  Dtype b_dtype;
  const void* b;  // its first element, or with a list the addresses of its rows
  int64_t b_row;  // between the rows of b, or between their addresses
  bool b_is_list;
  void* target;
  int64_t target_row;
  int64_t rows, columns, K;
  bool add;
};

constexpr int64_t kMatrixRows = 48;  // rows of a panel

struct CpuKernels {
  const char* isa;
  PassKernels<ScanArgs> forward;
  PassKernels<ScanBackwardArgs> backward;
  // arrays.inl
  void (*from_float)(Dtype, const float* source, void* target, int64_t count);
  // matrix.inl: pack every block of b, then multiply any rows of target, each with a panel of its own
  size_t (*matrix_bytes)(const ProductArgs&);
  size_t (*matrix_panel_bytes)(const ProductArgs&);
  int64_t (*matrix_blocks)(const ProductArgs&);
  void (*pack_matrix)(const ProductArgs&, void* packed, int64_t block);
  void (*multiply_matrix)(const ProductArgs&, const void* packed, void* panel, int64_t first, int64_t last);
  void (*sum_rows)(bool is_double, const void* source, void* sums, int64_t rows, int64_t stride, int64_t begin,
                   int64_t end);
};

const CpuKernels& kernels_base();
#if defined(FASTRNN_X86)
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();
#endif

}  // namespace fastrnn

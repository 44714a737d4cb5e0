// The kernels of a pass in which one block of threads runs all steps of a few rows: weight_hh stays in registers, h in
// shared memory. Pointers are device memory; dimension key and the meaning of the types: csrc/scan.h.
#pragma once

#include "step_kernels.h"

namespace fastrnn::cuda {

// Which rows a step has.
struct Steps {
  int64_t T, B;
  const int64_t* offsets;  // [T + 1] first row of each step, in device memory; null: B rows in every step

  FASTRNN_FN int64_t row(int64_t t) const { return offsets ? offsets[t] : t * B; }
  FASTRNN_FN int64_t count(int64_t t) const { return t < 0 || t >= T ? 0 : offsets ? offsets[t + 1] - offsets[t] : B; }
  // Of a block's rows from `first` on, those that the step has.
  FASTRNN_FN int live(int64_t t, int64_t first) const {
    const int64_t rows = count(t) - first;
    return static_cast<int>(rows < 0 ? 0 : rows < kBlockRows ? rows : kBlockRows);
  }
};

// Steps [first, end), in the order in which they run, from the states in the panels and into them. Of `cell`, rows,
// product and projection are not used; gates holds the input products of just these steps.
struct BlockForwardArgs {
  ForwardArgs cell;
  Steps steps;
  int64_t first, end;
  bool pairs;              // H is even
  int64_t gates_begin[2];  // the data row of the first row of gates, of groups that run forward (0), in reverse (1)
  const void* weight_hh;   // Storage [D, G, H, H]
};

// All steps. Of `cell`, rows, product, projection and the panels are not used.
struct BlockBackwardArgs {
  BackwardArgs cell;
  Steps steps;
  bool pairs;             // H is even, and all arrays begin at an even element
  const void* weight_hh;  // Storage [D, G, H, H]
};

// Offsets of up to kMost steps, to device memory.
struct OffsetsArgs {
  static constexpr int kMost = 448;
  int64_t values[kMost];
  int64_t count;
  int64_t* target;
};

struct BlockKernels {
  void (*forward)(const BlockForwardArgs&, Queue);
  void (*backward)(const BlockBackwardArgs&, Queue);
  void (*offsets)(const OffsetsArgs&, Queue);
};

const BlockKernels& block_kernels();

}  // namespace fastrnn::cuda

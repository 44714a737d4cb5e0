// The kernels of a pass that takes one matrix product and one of these per time step, as csrc/cuda/step_pass.h calls
// them. Pointers are device memory, arrays contiguous; dimension key and the meaning of the types: csrc/scan.h.
#pragma once

#include <algorithm>

#include "../scan.h"
#include "sizes.h"

namespace fastrnn::cuda {

using Queue = void*;  // where kernels are put: a CUDA stream; the host has none

// What differs between the groups that run forward (0) and in reverse (1) in one step.
struct StepRows {
  // The first data row of the step, and the rows that take part in it.
  int64_t row, count;
  // Rows that take part in the next step (forward), or that took part in the step run before (backward).
  int64_t count_next;
  // Backward and at boundaries: the first data row of the time step before this one, and how many rows have one.
  int64_t row_before, count_before;
  // Forward: the first row of the step in the input products.
  int64_t gates_row;
};

struct StepShape {
  CellId cell;
  Dtype dtype;
  bool projected;
  int64_t N, D, B, H, P;
  Direction direction;

  FASTRNN_FN int reversed(int64_t d) const {
    return direction == Direction::kReverse || (direction == Direction::kBoth && 2 * d >= D) ? 1 : 0;
  }
};

// A shape with the rows of a step.
struct OneStep : StepShape {
  StepRows rows[2];

  // No index: where the arguments lie in registers it would move them into memory.
  FASTRNN_FN StepRows rows_of(int64_t d) const {
    if (reversed(d)) return rows[1];
    return rows[0];
  }
  // Of the step run before, or of this one: whichever has more.
  int64_t most_rows() const { return std::max({rows[0].count, rows[0].count_next, rows[1].count, rows[1].count_next}); }
};

// The states before the first step: panels h [D, B, P] and c [D, B, H] from h0 and c0, or zeros.
struct EnterArgs : StepShape {
  const void *h0, *c0;  // Storage [D, B, P], [D, B, H], or null
  void* h;              // Storage [D, B, P]
  void* c;              // Compute [D, B, H], or null
};

// Of one group: bias [G + R, H]: b_ih, in all but the last R gates with b_hh; then b_hh of the last R gates.
struct BiasArgs : StepShape {
  const void *bias_ih, *bias_hh;  // Storage [G, H]
  void* bias;                     // Compute [G + R, H]
};

// A step of the cell: x + bias and r to the states after it.
struct ForwardArgs : OneStep {
  const void* gates;    // Compute [D, gates_rows, G, H] input products
  int64_t gates_rows;   // of a group
  const void* product;  // Compute [D, product_rows, G, H] recurrent products
  int64_t product_rows;
  const void* bias;  // Compute [D, G + R, H], or null
  void* h;           // Storage [D, B, P] panel
  void* c;           // Compute [D, B, H] panel, cells with c only
  void* m;           // Compute [D, product_rows, H] o tanh(c), projected only
  void *output, *h_n, *c_n, *cells, *saved;
};

// The projected h of a step, Compute [D, product_rows, P], to where it belongs.
struct ProjectArgs : OneStep {
  const void* product;
  int64_t product_rows;
  void *h, *output, *h_n;
};

// A backward step of the cell. Rows beyond `count` have run their first step: gradients of their initial states.
struct BackwardArgs : OneStep {
  // Compute [D, product_rows, P] gradient of h from the step run before; projected: [.., H], of the unprojected h of
  // all rows of the step.
  const void* product;
  int64_t product_rows;
  const void *doutput, *dh_n, *dc_n, *output, *cells, *saved, *h0, *c0;
  void* dr;  // Storage [D, B, G, H] panel: gradient of the recurrent pre-activations
  void* dh;  // Compute [D, B, H] panel: the part of the gradient of h that does not pass through the product
  void* dc;  // Compute [D, B, H] panel
  void *dgates, *drecurrent, *unprojected, *before, *dh0, *dc0;
  const void* c_before;  // Compute [D, B, H] panel: c that entered the step, at boundaries only
};

// Whether the arrays that may be a caller's begin at a multiple of `units` elements.
inline bool are_aligned(const BackwardArgs& a, int units) {
  const bool is_double = a.dtype == Dtype::kDouble, is_float = a.dtype == Dtype::kFloat;
  const size_t item = is_double ? 8 : is_float ? 4 : 2, compute_item = is_double ? 8 : 4;
  const auto aligned = [&](const void* array, size_t bytes) {
    return reinterpret_cast<uintptr_t>(array) % (static_cast<size_t>(units) * bytes) == 0;
  };
  bool all = aligned(a.cells, compute_item);
  for (const void* array : {a.doutput, a.dh_n, a.dc_n, a.output, a.saved, a.h0, a.c0})
    all = all && aligned(array, item);
  return all;
}

// The whole gradient of a step's projected h, and of h0 of the rows beyond `count`.
struct BackwardProjectArgs : OneStep {
  const void* product;  // Compute [D, product_rows, P]
  int64_t product_rows;
  const void *doutput, *dh_n, *output, *h0;
  void* dp;  // Compute [D, dp_rows, P]
  int64_t dp_rows;
  void *dprojected, *before, *dh0;
};

// A step whose states may come from elsewhere than the step before it: ScanShape::entering of csrc/scan.h. Nobody has
// checked what resets hold: everything else is a kRestart.
struct BoundaryArgs : OneStep {
  const uint8_t* resets;  // [N], or null
  int64_t K;
  const void *h0, *c0;  // Storage [D, K, P], [D, K, H], or null

  FASTRNN_FN int64_t entering(const StepRows& step, int64_t d, int64_t b) const {
    const bool reverse = reversed(d), first = b >= step.count_before;
    int reset = kCarry;
    if (resets && !(reverse && first)) reset = resets[(reverse ? step.row_before : step.row) + b];
    return reset == kReset ? B + b : first || reset != kCarry ? b : -1;
  }
};

// Before the product of a step: into the panels the states that enter it, of rows that do not go on with those of the
// step before.
struct ForwardBoundaryArgs : BoundaryArgs {
  void *h, *c;  // as in ForwardArgs
};

// Behind the first product of a backward step. Where another state entered the step run before, its gradient leaves the
// product and the panels for the sums of that state. Then they hold, for all rows of the step, the gradient of the
// states after it, with dh_n and dc_n of a row's last step and dcells; and h_before and c_before what entered it.
struct BackwardBoundaryArgs : BoundaryArgs {
  StepRows behind[2];  // the step run before
  const void *dh_n, *dc_n, *dcells, *output, *cells;
  void* product;  // Compute [D, product_rows, P]
  int64_t product_rows;
  void *dh, *dc;              // as in BackwardArgs; dh: null in a projected pass
  void *h_before, *c_before;  // panels: Storage [D, B, P], or null: not wanted; Compute [D, B, H]
  void *dh_sum, *dc_sum;      // Compute [D, K, P] and [D, K, H], or null: not wanted

  FASTRNN_FN StepRows behind_of(int64_t d) const {
    if (reversed(d)) return behind[1];
    return behind[0];
  }
};

// The arguments of a program, in device memory: of the kernel of the cell, of that of the projection, and the rows of
// each step, in place of those in the arguments.
template <class CellArgs, class ProjectionArgs>
struct StepTable {
  CellArgs cell;
  ProjectionArgs projection;
  StepRows rows[kProgramSteps][2];
};
using ForwardTable = StepTable<ForwardArgs, ProjectArgs>;
using BackwardTable = StepTable<BackwardArgs, BackwardProjectArgs>;

// sum[row, column] += term[row, column], Compute; count elements of term [rows, columns], rows of sum sum_stride apart.
struct AddArgs {
  Dtype dtype;
  const void* term;
  void* sum;
  int64_t count, columns, sum_stride;
};

// Compute -> Storage.
struct NarrowArgs {
  Dtype dtype;
  const void* source;
  void* target;
  int64_t count;
};

// The kernels of the steps of a pass: of the cell, and of the projection.
template <class Table>
struct PassKernels {
  // A step with the arguments, and their rows, of a table on the host.
  void (*cell)(const Table&, Queue);
  void (*projection)(const Table&, Queue);
  // A step of a program, with what the table in device memory holds when it runs; shape, dtype and units are those of
  // `like`, on the host.
  void (*cell_of)(const Table& like, const Table* table, int step, Queue);
  void (*projection_of)(const Table& like, const Table* table, int step, Queue);
  void (*write)(const Table&, Table* table, Queue);  // to device memory
};

struct StepKernels {
  void (*enter)(const EnterArgs&, Queue);
  void (*bias)(const BiasArgs&, Queue);
  PassKernels<ForwardTable> forward;
  PassKernels<BackwardTable> backward;
  PassKernels<BackwardTable> backward_of_panels;  // behind backward_boundary; no programs
  void (*forward_boundary)(const ForwardBoundaryArgs&, Queue);
  void (*backward_boundary)(const BackwardBoundaryArgs&, Queue);
  void (*add)(const AddArgs&, Queue);
  void (*narrow)(const NarrowArgs&, Queue);
  int (*backward_units)(const BackwardArgs&);  // of a thread: 1 where an array of the caller begins at an odd element
};

const StepKernels& step_kernels();

}  // namespace fastrnn::cuda

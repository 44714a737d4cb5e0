// The passes of a GPU: one matrix product and one gate kernel per time step, for any shape and dtype; or, where
// csrc/cuda/plan.h says so, blocks of threads for all steps, each for a few rows or for a few units.
//
// Computes   csrc/scan.h: the cells along time, forward and backward, all groups of a step at once
// Work       per step a product by weight_hh of all groups (torch's), then a kernel of step_kernels.h; with a
//            projection one more of each, with resets or dcells one more kernel. Or one kernel of block_kernels.h or
//            grid_kernels.h. The products with weight_ih come before, for the steps of a chunk at once
// Memory     torch's allocator: input products of a chunk (at most kChunkBytes of them, or of one step), panels of the
//            states, and for several groups a copy of weight_hh that stands as one batch
// Requires   arguments on one device, checked by ops.cpp; batch sizes in host memory
// Programs   with a recorder, kProgramSteps steps at a time are put on the queue (csrc/cuda/program.h), which then work
//            on memory that is kept from call to call, with a copy of weight_hh
// Order      everything on one queue, one after the other: nothing waits for the device, nothing runs beside it
#pragma once

#include <string>

#include "../device.h"
#include "block_kernels.h"
#include "grid_kernels.h"
#include "step_kernels.h"

namespace fastrnn::cuda {

class Recorder;

// Which kernel is asked for, and whether those may be chosen that are not proven on a GPU yet.
struct Asked {
  std::string kernel = "auto";
  bool persistent = false;
  bool flags = false;                 // of the mailbox of a grid (exchange.h)
  int64_t multiprocessors = 1 << 20;  // at most
};

// Gives the word of the host, 0 at first, in which kernels of grids say that they gave up; null if there is none yet,
// and none is to be made.
using Report = uint32_t* (*)(bool make);

// Where a pass runs.
struct Context {
  const Device& device;
  const StepKernels& step;
  const BlockKernels& block;
  const GridKernels& grid;
  Queue queue;
  GpuLimits gpu;  // as much of it as is asked for
  Asked asked;
  Recorder* recorder;  // of programs, or null
  Report report;       // of kernels of grids
};

void scan(const ScanArgs& args, const Context& context);
void scan(const ScanBackwardArgs& args, const Context& context);

}  // namespace fastrnn::cuda

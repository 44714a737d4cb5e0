// The kernels of a pass in which all multiprocessors work together: each block keeps weight_hh of 16 hidden units on
// chip and runs all steps, the operand of the next step goes through a mailbox (exchange.h). Pointers are device
// memory; dimension key and the meaning of the types: csrc/scan.h.
#pragma once

#include "block_kernels.h"
#include "exchange.h"

namespace fastrnn::cuda {

// What either pass has.
struct GridArgs {
  Steps steps;
  const uint32_t* weights;  // of all groups, weight_words of each (grid_kernels().pack)
  int64_t weight_words;
  Mailbox mailbox;               // ready (grid_kernels().prepare)
  bool flags;                    // FlagExchange, not WordExchange
  bool exact;                    // float as it is, not TF32
  int unit_blocks;               // blocks that share the units of a group
  int row_groups;                // of blocks: tile i of 8 rows belongs to row group i % row_groups
  int first_group, group_count;  // the groups that take part
};

// Steps [first, end), in the order in which they run, from the states in the panels and into them. Of `cell`, rows,
// product and projection are not used; gates holds the input products of just these steps.
struct GridForwardArgs : GridArgs {
  ForwardArgs cell;
  int64_t first, end;
  int64_t gates_begin[2];  // the data row of the first row of gates, of groups that run forward (0), in reverse (1)
};

// All steps. Of `cell`, rows, product, dr and projection are not used; dh and dc are panels.
struct GridBackwardArgs : GridArgs {
  BackwardArgs cell;
};

// Makes a mailbox ready: nothing is there, but for words of units that nobody has, which are 0.
struct PrepareArgs {
  Mailbox mailbox;
  int D, k_blocks_of_gate, words_of_row;  // words of a row of a gate that somebody publishes
};

// weight_hh of a group, in the order in which the threads of blocks take it (grid_products.h).
struct PackWeightsArgs {
  Dtype dtype;
  bool exact;          // as in GridArgs
  bool is_backward;    // transposed: rows are units of h, k the units of one gate after the other
  const void* weight;  // Storage [G, H, H]
  uint32_t* target;
  int64_t words;
  int G, H, k_blocks;  // k_blocks: of the operand
};

struct GridKernels {
  void (*forward)(const GridForwardArgs&, Queue);
  void (*backward)(const GridBackwardArgs&, Queue);
  void (*prepare)(const PrepareArgs&, Queue);
  void (*pack)(const PackWeightsArgs&, Queue);
};

const GridKernels& grid_kernels();

}  // namespace fastrnn::cuda

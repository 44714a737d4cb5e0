// The launches of csrc/cuda on the host, for the files that build its kernels of blocks and of grids.
#pragma once

#include "host_grid.h"

namespace fastrnn::cuda {

template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue) {
  check_grid(items, groups);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t item = 0; item < items; ++item) kernel({item, group});
}

// Blocks do not depend on each other: the last one first.
template <class Kernel>
void launch_blocks(const Kernel& kernel, int64_t blocks, int64_t groups, Queue) {
  check_blocks(blocks, groups);
  for (int64_t group = groups - 1; group >= 0; --group)
    for (int64_t block = blocks - 1; block >= 0; --block) HostBlock::run(kernel, block, group);
}

template <class Kernel>
void launch_together(const Kernel& kernel, int64_t blocks, int64_t groups, Queue) {
  check_blocks(blocks, groups);
  HostGrid::run(kernel, blocks, groups);
}

}  // namespace fastrnn::cuda

// The kernels of blocks (csrc/cuda/block_kernels.h) built for the host: see cuda_on_host.cpp.
#include "cuda/block_kernels.inl"
#include "host_block.h"

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

}  // namespace fastrnn::cuda

// The kernels of grids (csrc/cuda/grid_kernels.h) built for the host: see cuda_on_host.cpp.
#include "cuda/grid_kernels.inl"
#include "host_grid.h"

namespace fastrnn::cuda {

template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue) {
  check_grid(items, groups);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t item = 0; item < items; ++item) kernel({item, group});
}

template <class Kernel>
void launch_together(const Kernel& kernel, int64_t blocks, int64_t groups, Queue) {
  check_blocks(blocks, groups);
  HostGrid::run(kernel, blocks, groups);
}

}  // namespace fastrnn::cuda

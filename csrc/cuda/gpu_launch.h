// `launch` on a GPU: every kernel of csrc/cuda goes through here.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "machine.h"

namespace fastrnn::cuda {

template <class Kernel>
__global__ void __launch_bounds__(kBlockThreads, 1) run(const __grid_constant__ Kernel kernel, int64_t items) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (item < items) kernel({item, static_cast<int64_t>(blockIdx.y)});
}

template <class Kernel>
void launch(const Kernel& kernel, int64_t items, int64_t groups, Queue queue) {
  static_assert(sizeof(Kernel) <= 4000, "what every GPU takes as arguments of a kernel is 4 KiB");
  if (items == 0 || groups == 0) return;
  check_grid(items, groups);
  const dim3 grid(static_cast<unsigned>((items + kBlockThreads - 1) / kBlockThreads), static_cast<unsigned>(groups));
  run<<<grid, kBlockThreads, 0, static_cast<cudaStream_t>(queue)>>>(kernel, items);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastrnn: a kernel could not be launched: ") + cudaGetErrorString(error));
}

}  // namespace fastrnn::cuda

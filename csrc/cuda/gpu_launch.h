// `launch`, `launch_blocks` and `launch_together` on a GPU: every kernel of csrc/cuda goes through here.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "block.h"

namespace fastrnn::cuda {

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastrnn: a kernel could not be launched: ") + cudaGetErrorString(error));
}

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
  check_launch();
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) run_blocks(const __grid_constant__ Kernel kernel) {
  kernel(Block());
}

template <class Kernel>
void launch_blocks(const Kernel& kernel, int64_t blocks, int64_t groups, Queue queue) {
  static_assert(sizeof(Kernel) <= 4000, "what every GPU takes as arguments of a kernel is 4 KiB");
  static_assert(Kernel::kSharedBytes <= (48 << 10), "what a block has without asking for more is 48 KiB");
  if (blocks == 0 || groups == 0) return;
  check_blocks(blocks, groups);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  run_blocks<<<grid, Kernel::kThreads, Kernel::kSharedBytes, static_cast<cudaStream_t>(queue)>>>(kernel);
  check_launch();
}

inline void check_together(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here
  throw std::runtime_error(std::string("fastrnn: a kernel whose blocks run at the same time could not be launched: ") +
                           cudaGetErrorString(error));
}

// Lets a kernel have as much shared memory as a block can on the current device, whatever this launch takes: another
// thread may be about to launch the same with more. Throws where it was compiled for GPUs that have none of its
// products.
template <class Kernel>
void prepare_together() {
  static std::atomic<uint64_t> prepared{0};  // a bit for a device
  int device = 0, most = 0;
  check_together(cudaGetDevice(&device));
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared & bit) return;
  void (*const body)(const Kernel) = run_blocks<Kernel>;
  cudaFuncAttributes facts{};
  check_together(cudaFuncGetAttributes(&facts, body));
  if (facts.ptxVersion < 80)
    throw std::runtime_error(
        "fastrnn: this kernel needs to be compiled for compute capability 8.0 or later, and is there for " +
        std::to_string(facts.ptxVersion / 10) + "." + std::to_string(facts.ptxVersion % 10));
  check_together(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check_together(cudaFuncSetAttribute(body, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      most - static_cast<int>(facts.sharedSizeBytes)));
  prepared |= bit;
}

template <class Kernel>
void launch_together(const Kernel& kernel, int64_t blocks, int64_t groups, Queue queue) {
  static_assert(sizeof(Kernel) <= 4000, "what every GPU takes as arguments of a kernel is 4 KiB");
  if (blocks == 0 || groups == 0) return;
  check_blocks(blocks, groups);
  prepare_together<Kernel>();
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  config.blockDim = dim3(Kernel::kThreads), config.dynamicSmemBytes = kernel.shared_bytes();
  config.stream = static_cast<cudaStream_t>(queue), config.attrs = &together, config.numAttrs = 1;
  check_together(cudaLaunchKernelEx(&config, run_blocks<Kernel>, kernel));
}

}  // namespace fastrnn::cuda

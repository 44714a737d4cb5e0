// The kernels of blocks (csrc/cuda/block_kernels.h) built for the host: see cuda_on_host.cpp.
#include "cuda/block_kernels.inl"
#include "host_launch.h"

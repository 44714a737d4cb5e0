// The kernels of grids (csrc/cuda/grid_kernels.h) built for the host: see cuda_on_host.cpp.
#include "cuda/grid_kernels.inl"
#include "host_launch.h"

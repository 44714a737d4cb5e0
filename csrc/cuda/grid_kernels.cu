// The kernels of grids for GPUs.
#include "gpu_launch.h"
#include "grid_kernels.inl"

// The kernels of blocks that run all steps, for GPUs.
#include "block_kernels.inl"
#include "gpu_launch.h"

// The kernels of a pass, for GPUs.
#include "gpu_launch.h"
#include "step_kernels.inl"

// The GPUs of this process.
#pragma once

#include "../device.h"

namespace fastrnn::cuda {

// A GPU by its index, as long as the device is there the current one, with torch's current stream on it.
std::unique_ptr<Device> current_device(int32_t index);

// A stream of a GPU that nothing else runs on, and that does not wait for the default stream; never destroyed.
intptr_t new_stream(int32_t index);

}  // namespace fastrnn::cuda

// Stands for kernels/cuda in builds without CUDA.
#include "kernels/cuda/devices.h"

namespace deinfer::cuda {

bool is_compiled() { return false; }

std::vector<DeviceInfo> devices() { return {}; }

}  // namespace deinfer::cuda

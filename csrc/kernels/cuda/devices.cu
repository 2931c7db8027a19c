#include "kernels/cuda/devices.h"

#include <cuda_runtime.h>

namespace deinfer::cuda {

bool is_compiled() { return true; }

std::vector<DeviceInfo> devices() {
  int count = 0;
  // Without a driver this fails; then there is no device to report.
  if (cudaGetDeviceCount(&count) != cudaSuccess) return {};
  std::vector<DeviceInfo> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    found.push_back({properties.name, properties.major * 10 + properties.minor,
                     properties.multiProcessorCount, properties.totalGlobalMem});
  }
  return found;
}

}  // namespace deinfer::cuda

// Where an engine runs.
#pragma once

#include <string>

namespace deinfer {

struct DeviceChoice {
  bool is_cuda = false;
  int index = 0;  // of the CUDA device
};

/// "cpu", "cuda", "cuda:N", or "auto": the first CUDA device that the kernels are made for (compute
/// capability 8.0 or later), else the CPU. Throws kInvalidArgument for other text and for a device
/// that there is not, kUnsupported where this build or machine has no CUDA, or the device is too
/// old.
DeviceChoice choose_device(const std::string& device);

}  // namespace deinfer

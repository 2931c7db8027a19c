// Where an engine runs.
#pragma once

#include <string>
#include <vector>

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

/// To be called before a process uses CUDA for several ranks, whose kernels wait for each other.
/// The driver must let those run that are waited for: every stream needs a queue of its own. It
/// reads how many there are from the environment; what stands there remains.
void prepare_concurrent_ranks();

/// The CUDA device of each of `ranks` ranks; empty for the CPU. "cuda" and "auto" go round the
/// visible devices, from the one that they choose for one rank; "cuda:N" puts all ranks on one.
/// Throws as choose_device().
std::vector<int> choose_devices(const std::string& device, int ranks);

}  // namespace deinfer

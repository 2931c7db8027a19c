// Which CUDA devices this process sees.
#pragma once

#include <string>
#include <vector>

namespace deinfer::cuda {

struct DeviceInfo {
  std::string name;
  int compute_capability = 0;  // 90 for sm_90
  int multiprocessors = 0;
  std::size_t memory_bytes = 0;
};

/// True when this build contains the CUDA sources.
bool is_compiled();

/// The visible devices; empty without a driver or without CUDA in the build.
std::vector<DeviceInfo> devices();

}  // namespace deinfer::cuda

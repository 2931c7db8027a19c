// As cuda_emulation/nccl_devices.h, of real devices and the NCCL that is installed.
#pragma once

#include <numeric>
#include <vector>

#include "base/check.h"
#include "comm/nccl_library.h"
#include "kernels/cuda/devices.h"

namespace deinfer::test {

inline std::vector<int> nccl_devices(int size) {
  if (static_cast<int>(cuda::devices().size()) < size) return {};
  try {
    nccl::load();
  } catch (const Error&) {
    return {};
  }
  std::vector<int> devices(static_cast<std::size_t>(size));
  std::iota(devices.begin(), devices.end(), 0);
  return devices;
}

}  // namespace deinfer::test

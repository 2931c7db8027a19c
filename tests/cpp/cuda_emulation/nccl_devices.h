// Devices for ranks that exchange by NCCL: emulated ones, and the fake of NCCL (fake_nccl.cc).
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <numeric>
#include <vector>

#include "fake_nccl.h"

namespace deinfer::test {

/// From here on NCCL is the fake.
inline emulation::FakeNccl& use_fake_nccl() {
  setenv("DEINFER_NCCL_LIBRARY", FAKE_NCCL, 1);
  void* handle = dlopen(FAKE_NCCL, RTLD_NOW);
  if (handle == nullptr) std::abort();
  using Find = emulation::FakeNccl* (*)();
  return *reinterpret_cast<Find>(dlsym(handle, "fake_nccl"))();
}

/// A device for each of `size` ranks; none where there are not so many, or no NCCL.
inline std::vector<int> nccl_devices(int size) {
  use_fake_nccl();
  emulation::device_state().count = size;
  std::vector<int> devices(static_cast<std::size_t>(size));
  std::iota(devices.begin(), devices.end(), 0);
  return devices;
}

}  // namespace deinfer::test

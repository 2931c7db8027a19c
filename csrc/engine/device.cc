#include "engine/device.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/devices.h"

namespace deinfer {
namespace {

constexpr int kMinimumCapability = 80;

/// The number after "cuda:", -1 if it is none.
int device_number(const std::string& text) {
  const bool digits =
      !text.empty() && text.size() <= 4 &&
      std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  return digits ? std::stoi(text) : -1;
}

void check_capability(const std::string& device, const cuda::DeviceInfo& info) {
  if (info.compute_capability >= kMinimumCapability) return;
  fail(ErrorCode::kUnsupported, "device=\"", device, "\": ", info.name, " has compute capability ",
       info.compute_capability / 10, ".", info.compute_capability % 10, ", the kernels need 8.0");
}

}  // namespace

DeviceChoice choose_device(const std::string& device) {
  if (device == "cpu") return {};
  const bool automatic = device == "auto";
  int index = 0;
  if (device.starts_with("cuda:")) index = device_number(device.substr(5));
  check_argument(automatic || index < 0 || device == "cuda" || device.starts_with("cuda:"),
                 "device=\"", device,
                 "\" is unknown; use \"cpu\", \"cuda\", \"cuda:N\" or \"auto\"");
  check_argument(index >= 0, "device=\"", device, "\": N in \"cuda:N\" is a number from 0");
  const std::vector<cuda::DeviceInfo> devices = cuda::devices();
  if (automatic) {
    auto found = std::find_if(devices.begin(), devices.end(), [](const cuda::DeviceInfo& info) {
      return info.compute_capability >= kMinimumCapability;
    });
    if (found == devices.end()) return {};
    return {true, static_cast<int>(found - devices.begin())};
  }
  if (!cuda::is_compiled()) {
    fail(ErrorCode::kUnsupported, "device=\"", device,
         "\": this build has no CUDA; build with DEINFER_CUDA=ON, or use \"cpu\"");
  }
  if (devices.empty()) {
    fail(ErrorCode::kUnsupported, "device=\"", device,
         "\": no CUDA device is visible: is there one, and its driver?");
  }
  check_argument(index < static_cast<int>(devices.size()), "device=\"", device, "\": there ",
                 devices.size() == 1 ? "is " : "are ", devices.size(), " CUDA device",
                 devices.size() == 1 ? "" : "s");
  check_capability(device, devices[static_cast<std::size_t>(index)]);
  return {true, index};
}

void prepare_concurrent_ranks() { setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); }

std::vector<int> choose_devices(const std::string& device, int ranks) {
  const DeviceChoice first = choose_device(device);
  if (!first.is_cuda) return {};
  std::vector<int> chosen(static_cast<std::size_t>(ranks), first.index);
  if (device.starts_with("cuda:")) return chosen;
  const std::vector<cuda::DeviceInfo> devices = cuda::devices();
  const int count = static_cast<int>(devices.size());
  for (int rank = 0; rank < ranks; ++rank) {
    const int index = (first.index + rank) % count;
    check_capability(device, devices[static_cast<std::size_t>(index)]);
    chosen[static_cast<std::size_t>(rank)] = index;
  }
  return chosen;
}

}  // namespace deinfer

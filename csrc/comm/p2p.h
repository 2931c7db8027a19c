// Ranks whose kernels read each other's device memory: by plain pointers on one device and by peer
// access between several. An exchange is one kernel, which tells the other ranks, waits for them on
// the device and reads their contributions.
#pragma once

#include "comm/device_communicator.h"

namespace deinfer {

/// open() throws kUnsupported where a device cannot read another's memory. An error of
/// synchronize() names the rank that was waited for, and the exchange.
std::unique_ptr<DeviceGroup> make_p2p_group(std::vector<int> devices,
                                            const ExchangeOptions& options);

}  // namespace deinfer

// Ranks on CUDA devices that cannot read each other's memory (consumer GPUs, some clouds): NCCL
// brings what a rank reads of the others' contributions into the memory of its own device, by
// whatever way it finds between them. Then the same kernels sum and gather as in p2p.cc, with the
// same bits.
#pragma once

#include "comm/device_communicator.h"

namespace deinfer {

/// Loads NCCL (nccl_library.h). Throws kUnsupported where there is none, where ranks share a device
/// (NCCL wants one for each), and for lockstep: a send ends when it is received. Waiting for ranks
/// is bounded by options.timeout_s, but for what NCCL itself waits for in open().
std::unique_ptr<DeviceGroup> make_nccl_group(std::vector<int> devices,
                                             const ExchangeOptions& options);

}  // namespace deinfer

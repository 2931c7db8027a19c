// What tests tell the fake of NCCL (fake_nccl.cc), and what it tells them.
#pragma once

#include <atomic>
#include <cstdint>

namespace emulation {

struct FakeNccl {
  std::atomic<int> version = 23203;
  // Results of ncclCommInitRank and ncclSend, and what ncclCommGetAsyncError finds.
  std::atomic<int> init_result = 0;
  std::atomic<int> send_result = 0;
  std::atomic<int> async_error = 0;
  std::atomic<int> comms = 0;  // that nobody has destroyed or aborted
  std::atomic<int> aborts = 0;
  std::atomic<std::uint64_t> groups = 0;  // of sends and receives, done
  std::atomic<std::uint64_t> bytes = 0;   // received
};

}  // namespace emulation

// Hand-over between ranks, which are OS threads here, in place of
// csrc/kernels/cuda/system_scope.cuh.
#pragma once

#include <sched.h>

#include <chrono>
#include <thread>

namespace deinfer::cuda {

inline void store_release_system(unsigned* address, unsigned value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

inline unsigned load_acquire_system(const unsigned* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline unsigned long long nanoseconds() {
  return static_cast<unsigned long long>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count());
}

/// Leaves the core to the ranks that are waited for.
inline void pause() {
  thread_local unsigned pauses = 0;
  if (++pauses % 16 != 0) {
    sched_yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

}  // namespace deinfer::cuda

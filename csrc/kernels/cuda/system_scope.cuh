// How threads of different devices, and the host, hand memory to each other.
#pragma once

#include <cuda_runtime.h>

namespace deinfer::cuda {

/// What this thread, and all that came before it in its stream, has written is visible to whoever
/// loads `value` by load_acquire_system().
__device__ __forceinline__ void store_release_system(unsigned* address, unsigned value) {
  __threadfence_system();
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire_system(const unsigned* address) {
  unsigned value = 0;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

/// Of a clock that runs at the same pace everywhere.
__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

/// Between two looks at memory that somebody else is to change.
__device__ __forceinline__ void pause() { __nanosleep(32); }

}  // namespace deinfer::cuda

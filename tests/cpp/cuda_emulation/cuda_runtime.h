// What deinfer uses of <cuda_runtime.h>, for g++: kernels run as fibers (fibers.h), streams of an
// emulated device run what they are given when somebody waits for them, not before.
//
// The meaning of each name: CUDA C++ Programming Guide and CUDA Runtime API, version 13.0.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
// Blocks of one OS thread run one after another.
#define __shared__ static thread_local
#define __syncthreads() emulation::sync_block(__LINE__)
#define __syncwarp() emulation::sync_warp(__LINE__)
#define __ballot_sync(mask, taken) emulation::ballot(mask, taken, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle_xor(mask, value, lanes, __LINE__)
#define __shfl_sync(mask, value, lane) emulation::shuffle(mask, value, lane, __LINE__)

namespace emulation {

/// All lanes take part in what deinfer's kernels do.
void check_mask(unsigned mask);

inline void sync_warp(int line) {
  char nothing = 0;
  exchange(&nothing, 1, line);
}
template <typename T>
T shuffle(unsigned mask, T value, int lane, int line) {
  check_mask(mask);
  const std::byte* all = exchange(&value, sizeof(T), line);
  std::memcpy(&value, all + sizeof(T) * static_cast<std::size_t>(lane % kWarpSize), sizeof(T));
  return value;
}
template <typename T>
T shuffle_xor(unsigned mask, T value, int lanes, int line) {
  return shuffle(mask, value, (static_cast<int>(threadIdx.x) % kWarpSize) ^ lanes, line);
}

inline unsigned ballot(unsigned mask, bool taken, int line) {
  check_mask(mask);
  const std::byte* all = exchange(&taken, sizeof taken, line);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    bits |= (all[lane] != std::byte{0} ? 1u : 0u) << lane;
  }
  return bits;
}

}  // namespace emulation

using std::max;
using std::min;
using dim3 = emulation::Dim3;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float __expf(float x) { return std::exp(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
/// Bytes of y and x (0-3 are x's), as the nibbles of `selector` choose them.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * byte) & 0xff) << (8 * i);
  }
  return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
// The blocks of one OS thread run one after another, and their threads in turns.
inline int atomicAdd(int* memory, int value) { return std::exchange(*memory, *memory + value); }
inline int atomicExch(int* memory, int value) { return std::exchange(*memory, value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600,
  cudaErrorPeerAccessAlreadyEnabled = 704,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t totalGlobalMem;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

extern "C" {
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, std::size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
}

namespace emulation {

/// What a stream does when somebody waits for it: called until it says that it is done.
using Work = std::function<bool()>;

// For libraries that are loaded at run time (fake_nccl.cc).
#define EMULATION_EXPORT __attribute__((visibility("default")))
/// Puts work into a stream, or into the graph that it captures; each launch of that has a copy.
EMULATION_EXPORT cudaError_t enqueue(cudaStream_t stream, Work work);
EMULATION_EXPORT bool is_capturing(cudaStream_t stream);

/// Puts a grid into a stream, or into the graph that it captures.
cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> body);

/// Of the emulated devices, for tests.
struct DeviceState {
  std::atomic<int> count = 1;                                    // devices
  std::atomic<std::size_t> memory_bytes = std::size_t{4} << 30;  // of all together
  std::atomic<std::size_t> used_bytes = 0;                       // allocated
  std::atomic<int> launches = 0;                                 // grids run, those of graphs too
  std::atomic<int> graphs = 0;                                   // instantiated
  std::atomic<int> graph_launches = 0;
  std::atomic<int> synchronizations = 0;
  std::atomic<bool> fails = false;  // every stream, from its next synchronization on
  std::atomic<bool> refuses_graphs = false;
  std::atomic<bool> reads_peers = true;
};
DeviceState& device_state();

}  // namespace emulation

struct cudaFuncAttributes {};
template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Params...)) {
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  std::tuple<Params...> copies(std::forward<Args>(args)...);
  return emulation::launch(*config, [kernel, copies] { std::apply(kernel, copies); });
}

// Small things that kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ void store_bf16(void* data, std::int64_t index, float value) {
  static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
}

__device__ __forceinline__ float load_bf16(const void* data, std::int64_t index) {
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
}

/// Two values as the halves of a register, the first in the lower.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits = 0;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/// The products of the halves of two registers.
__device__ __forceinline__ unsigned multiply_bf16(unsigned a, unsigned b) {
  __nv_bfloat162 x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  x = __hmul2(x, y);
  memcpy(&a, &x, sizeof a);
  return a;
}

/// The sum over a warp, the same in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

/// The sum over a block of kThreads, the same in every thread.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float parts[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // the sum before has been read
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += parts[i];
  return sum;
}

/// An element of a row: the largest, of equal ones the first. NaN is never the largest.
struct Best {
  float value;
  int index;
};

/// Of the elements that are this thread's; {-inf, 0} where none is larger than -inf.
template <int kThreads>
__device__ __forceinline__ Best largest_of(const float* x, int n) {
  Best best = {-INFINITY, 0};
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) {
    if (x[j] > best.value) best = {x[j], j};
  }
  return best;
}

__device__ __forceinline__ Best better(Best a, Best b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

/// The best of a block's, the same in every thread.
template <int kThreads>
__device__ __forceinline__ Best block_best(Best best) {
  __shared__ Best parts[kThreads / kWarp];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    best = better(best, {__shfl_xor_sync(kAllLanes, best.value, lanes),
                         __shfl_xor_sync(kAllLanes, best.index, lanes)});
  }
  __syncthreads();  // the parts before have been read
  if (lane_id() == 0) parts[warp_id()] = best;
  __syncthreads();
  best = parts[0];
  for (int i = 1; i < kThreads / kWarp; ++i) best = better(best, parts[i]);
  return best;
}

__device__ __forceinline__ float soft_capped(float value, float cap) {
  return cap > 0.0f ? cap * tanhf(value / cap) : value;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + expf(-2.0f * u));
}

/// Elements before K of a slot in a layer's pool; dimensions follow one another.
__device__ __forceinline__ std::int64_t key_offset(const KvPool& pool, int slot, int head) {
  const std::int64_t page = std::int64_t{slot / pool.block_size} * pool.kv_heads + head;
  return (page * pool.block_size + slot % pool.block_size) * pool.head_width;
}

/// Elements before element `d` of V of a slot; in a page, positions follow one another.
__device__ __forceinline__ std::int64_t value_offset(const KvPool& pool, int slot, int head,
                                                     int d) {
  const std::int64_t page = std::int64_t{slot / pool.block_size} * pool.kv_heads + head;
  return (page * pool.head_width + d) * pool.block_size + slot % pool.block_size;
}

/// Launches a kernel and says how that went, as a cudaError_t.
template <typename... Params, typename... Args>
int launch(Stream stream, dim3 grid, int threads, void (*kernel)(Params...), const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args...));
}

/// Loads a kernel, and says how that went.
template <typename... Params>
int load(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes{};
  return static_cast<int>(cudaFuncGetAttributes(&attributes, kernel));
}
/// The first failure of several, or success.
inline int first_failure(std::initializer_list<int> statuses) {
  for (int status : statuses) {
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

/// A grid of one dimension; or two.
inline dim3 grid_of(int x, int y = 1) {
  return dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
}

}  // namespace deinfer::cuda

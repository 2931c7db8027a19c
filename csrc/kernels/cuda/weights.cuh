// Weights on their way from memory into mma_bf16(): bf16 as they lie, int8 made bf16 in registers.
#pragma once

#include "kernels/cuda/device.cuh"

namespace deinfer::cuda {

/// A lane's part of a tile of weights: 8 columns of two rows, its operands of two steps.
template <bool kInt8>
struct WeightTile {
  static constexpr int kLoads = kInt8 ? 1 : 2;
  uint4 bits[kLoads];
};

/// This lane's part of the first of some tiles that follow one another.
template <bool kInt8>
__device__ __forceinline__ const uint4* lane_weights(const void* w, std::int64_t tiles_before) {
  return static_cast<const uint4*>(w) + tiles_before * (WeightTile<kInt8>::kLoads * kWarp) +
         lane_id();
}

/// Tile `index` after the one that `w` points to.
template <bool kInt8>
__device__ __forceinline__ WeightTile<kInt8> load_tile(const uint4* w, int index) {
  constexpr int kLoads = WeightTile<kInt8>::kLoads;
  WeightTile<kInt8> tile;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) tile.bits[i] = __ldg(w + (index * kLoads + i) * kWarp);
  return tile;
}

/// Two q / kInt8Unit in bf16, exact: magnitude and sign, in bits 0-6 and 15 of each half, are a
/// subnormal number already, q 2^-133, of which a product with 2^127 makes a normal one.
__device__ __forceinline__ unsigned expand_int8(unsigned bits) {
  return multiply_bf16(bits & 0x807f807fu, 0x7f007f00u);
}

/// The operands a[0] and a[1] of the two steps.
__device__ __forceinline__ void operands(const WeightTile<false>& tile, uint4 (&a)[2]) {
  a[0] = tile.bits[0];
  a[1] = tile.bits[1];
}
__device__ __forceinline__ void operands(const WeightTile<true>& tile, uint4 (&a)[2]) {
  constexpr unsigned kExchanged = 0x2301;  // bytes within halves: the other row's (int8_bits)
  const uint4 q = tile.bits[0];
  a[0] = {expand_int8(q.x), expand_int8(__byte_perm(q.x, 0, kExchanged)), expand_int8(q.y),
          expand_int8(__byte_perm(q.y, 0, kExchanged))};
  a[1] = {expand_int8(q.z), expand_int8(__byte_perm(q.z, 0, kExchanged)), expand_int8(q.w),
          expand_int8(__byte_perm(q.w, 0, kExchanged))};
}

/// A sum of products of q / kInt8Unit, times its row's scale. Not to be contracted with what
/// follows: it has the same bits wherever it is computed.
template <bool kInt8>
__device__ __forceinline__ float scaled(float sum, const float* scales, int row) {
  return kInt8 ? __fmul_rn(sum, scales[row]) : sum;
}

/// W[row, col], `scales` of int8 weights, else null.
__device__ __forceinline__ float load_weight(const void* w, const float* scales, int row, int col,
                                             int chunks) {
  if (scales == nullptr) return load_bf16(w, weight_offset(row, col, chunks));
  unsigned pair = static_cast<const std::uint16_t*>(w)[int8_offset(row, col, chunks)];
  if (row % kTileRows >= 8) pair = pair >> 8 | pair << 8;
  const auto q = static_cast<float>(pair & 0x7fu);
  return ((pair & 0x8000u) != 0 ? -q : q) * (1.0f / kInt8Unit) * scales[row];
}

}  // namespace deinfer::cuda

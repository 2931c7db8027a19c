// K and V of latents, made by a block in its shared memory for some positions at a time.
#pragma once

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/latents.h"
#include "kernels/cuda/weights.cuh"

namespace deinfer::cuda {

inline constexpr int kRebuildWarps = 8;  // of a block
inline constexpr int kPositionTiles = kChunk / kTileTokens;

/// Where a block keeps what it rebuilds, for heads of up to kWidth elements.
template <int kWidth>
struct Rebuilt {
  static constexpr int kPositions = 8192 / kWidth;  // at a time
  static constexpr int kKeyWidth = kWidth + 8;      // rows do not begin in the same bank
  static constexpr int kValueWidth = kPositions + 8;
  uint4 keys[kPositions * kKeyWidth / 8];         // [position, element]
  uint4 values[kWidth * kValueWidth / 8];         // [element, position]
  float squares[kWidth / kTileRows][kPositions];  // of keys' elements in a tile of rows
  float scales[kPositions];                       // of keys with a norm
};

/// total[16 rows, 32 positions] = U z of rows `tile` of kv head `head`, with the sums and bits of
/// linear.cu. Positions from `position` on, none after `last`.
template <bool kInt8>
__device__ __forceinline__ void rebuild_tile(const HeadFactor& factor, const KvPool& pool,
                                             const int* table, int head, int tile, int position,
                                             int last, float (&total)[kPositionTiles][4]) {
  const int quad = lane_id() % 4;
  const std::int64_t row_tile = std::int64_t{head} * factor.tiles + tile;
  const uint4* w = lane_weights<kInt8>(factor.w, row_tile * factor.chunks);
  const uint4* z[kPositionTiles];
#pragma unroll
  for (int j = 0; j < kPositionTiles; ++j) {
    const int own = min(position + j * kTileTokens + lane_id() / 4, last);
    const int slot = slot_of(table, pool.block_size, own);
    z[j] = static_cast<const uint4*>(pool.k) + key_offset(pool, slot, 0) / 8 + quad;
  }
  const int length = tiles_of(factor.chunks, kSlices);
#pragma unroll 1
  for (int begin = 0; begin < factor.chunks; begin += length) {
    float acc[kPositionTiles][4] = {};
    const int end = min(begin + length, factor.chunks);
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
      uint4 a[2];
      operands(load_tile<kInt8>(w, chunk), a);
      const bool inside = chunk * kTileCols + quad * 8 < pool.head_width;
#pragma unroll
      for (int j = 0; j < kPositionTiles; ++j) {
        const uint4 b = inside ? z[j][chunk * 4] : uint4{0, 0, 0, 0};
        mma_bf16(acc[j], a[0], b.x, b.y);
        mma_bf16(acc[j], a[1], b.z, b.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kPositionTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[j][e] += acc[j][e];
    }
  }
  const auto row = static_cast<int>(row_tile) * kTileRows + lane_id() / 4;
#pragma unroll
  for (int j = 0; j < kPositionTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      total[j][e] = scaled<kInt8>(total[j][e], factor.scales, row + e / 2 * 8);
      if (factor.bias != nullptr) total[j][e] += factor.bias[row + e / 2 * 8];
    }
  }
}

/// f(tile of rows, first position) for the parts of a factor's product over positions
/// [begin, end), shared out among the warps.
template <typename F>
__device__ __forceinline__ void for_tiles(const HeadFactor& factor, int begin, int end, F f) {
  const int groups = tiles_of(end - begin, kChunk);
#pragma unroll 1
  for (int unit = warp_id(); unit < factor.tiles * groups; unit += kRebuildWarps) {
    f(unit % factor.tiles, begin + unit / factor.tiles * kChunk);
  }
}

/// K of positions [begin, end), which shared memory has from `begin` on: with gain and rotation,
/// but what multiplies all of a key, its norm, is left to the scores.
template <bool kInt8, int kWidth>
__device__ __forceinline__ void rebuild_keys(const LatentAttentionLaunch& args, const int* table,
                                             int head, int begin, int end, Rebuilt<kWidth>& out) {
  const HeadFactor& factor = args.key_factor;
  const int row = lane_id() / 4;
  const int half = args.rotation.half;
  const bool per_head = args.key_gain != nullptr && args.key_scales == nullptr;
  const float* gain = args.key_gain;
  if (args.key_scales != nullptr) gain += head * args.head_dim;
  auto* keys = reinterpret_cast<__nv_bfloat16*>(out.keys);
  for_tiles(factor, begin, end, [&](int tile, int position) {
    float y[kPositionTiles][4] = {};
    rebuild_tile<kInt8>(factor, args.keys, table, head, tile, position, end - 1, y);
    const int first = half > 0 ? tile * 8 + row : tile * kTileRows + row;
    const int second = half > 0 ? first + half : first + 8;
    const bool has_first = first < (half > 0 ? half : args.head_dim);
    const bool has_second = has_first && second < args.head_dim;
#pragma unroll
    for (int j = 0; j < kPositionTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int place = position - begin + j * kTileTokens + lane_id() % 4 * 2 + e;
        float low = y[j][e];
        float high = y[j][e + 2];
        if (per_head) {
          float squares = low * low + high * high;
          for (int lanes = 4; lanes < kWarp; lanes *= 2) {
            squares += __shfl_xor_sync(kAllLanes, squares, lanes);
          }
          if (row == 0) out.squares[tile][place] = squares;
        }
        if (gain != nullptr) {
          if (has_first) low *= gain[first];
          if (has_second) high *= gain[second];
        }
        if (half > 0 && has_first) {
          const std::int64_t at = std::int64_t{min(begin + place, end - 1)} * half + first;
          const float cos = args.rotation.cos[at];
          const float sin = args.rotation.sin[at];
          const float turned = low * cos - high * sin;
          high = high * cos + low * sin;
          low = turned;
        }
        const int at = place * Rebuilt<kWidth>::kKeyWidth;
        if (has_first) store_bf16(keys, at + first, low);
        if (has_second) store_bf16(keys, at + second, high);
      }
    }
  });
}

/// What the norm of rebuilt keys multiplies their scores with.
template <int kWidth>
__device__ __forceinline__ void scale_keys(const LatentAttentionLaunch& args, const int* table,
                                           int begin, int end, Rebuilt<kWidth>& out) {
  const int place = static_cast<int>(threadIdx.x);
  if (place >= end - begin) return;
  if (args.key_scales != nullptr) {
    out.scales[place] = args.key_scales[slot_of(table, args.keys.block_size, begin + place)];
    return;
  }
  float sum = 0.0f;
  for (int tile = 0; tile < args.key_factor.tiles; ++tile) sum += out.squares[tile][place];
  out.scales[place] = 1.0f / sqrtf(sum / static_cast<float>(args.head_dim) + args.key_eps);
}

/// V of positions [begin, end), likewise.
template <bool kInt8, int kWidth>
__device__ __forceinline__ void rebuild_values(const LatentAttentionLaunch& args, const int* table,
                                               int head, int begin, int end, Rebuilt<kWidth>& out) {
  const HeadFactor& factor = args.value_factor;
  auto* values = reinterpret_cast<__nv_bfloat16*>(out.values);
  for_tiles(factor, begin, end, [&](int tile, int position) {
    float y[kPositionTiles][4] = {};
    rebuild_tile<kInt8>(factor, args.values, table, head, tile, position, end - 1, y);
#pragma unroll
    for (int j = 0; j < kPositionTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int element = tile * kTileRows + lane_id() / 4 + e / 2 * 8;
        const int place = position - begin + j * kTileTokens + lane_id() % 4 * 2 + e % 2;
        if (element >= args.head_dim) continue;
        store_bf16(values, element * Rebuilt<kWidth>::kValueWidth + place, y[j][e]);
      }
    }
  });
}

}  // namespace deinfer::cuda

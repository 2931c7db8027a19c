// Kernels over a KV cache that keeps latents z = V x of decomposed keys or values, as host code
// launches them (kernels.h). Pools of latents have one head: z lies as keys do, k[block, 1,
// position, width], where K or V is made of it again or scores are taken from it, and as values do,
// v[block, 1, width, position], where outputs are sums of it. width is the rank, padded with zeros
// to a multiple of kLatentPadding.
#pragma once

#include <cstddef>

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

inline constexpr int kLatentPadding = 8;  // elements of 16 bytes
constexpr int latent_width(int rank) { return tiles_of(rank, kLatentPadding) * kLatentPadding; }

/// Columns that a head's part of activations has, so that products can read it alone.
constexpr int head_columns(int elements) { return tiles_of(elements, kTileCols) * kTileCols; }

/// Puts z of tokens into their slots.
struct LatentWriteLaunch {
  struct Side {
    int chunk = 0;  // of z, where its tiles of columns begin
    KvPool pool;    // k or v; neither: nothing is stored
  };
  const void* z = nullptr;  // activations
  int z_chunks = 0;
  Side sides[2];
  int m = 0;
  const int* slots = nullptr;  // [m]; -1: nowhere
};
int launch_latent_write(const LatentWriteLaunch& args, Stream stream);

/// U of every kv head, whose rows begin with a tile each.
struct HeadFactor {
  const void* w = nullptr;        // as LinearFactor::w; null: nothing is rebuilt
  const float* bias = nullptr;    // [rows of all tiles]; or null
  int tiles = 0;                  // of rows, per head
  int chunks = 0;                 // tiles of columns
  const float* scales = nullptr;  // as LinearFactor::scales; both factors are of one type
};

/// Of sums over splits, for which warps of so many blocks have no registers.
constexpr std::size_t latent_totals_bytes(int blocks) {
  return static_cast<std::size_t>(blocks) * 8 * 16 * 128 * sizeof(float);
}

/// Attention of which a side, or both, comes from latents. A block makes K or V of some positions
/// of a kv head in shared memory, where they serve all of its warps; a warp has 16 query rows and
/// up to 128 columns of the output. Splits and chunks are those of launch_attention(), so that what
/// is rebuilt (but for keys with a norm) gives the bits of a dense cache.
struct LatentAttentionLaunch {
  /// Its kv: kv_heads are those that tasks are for (1, where nothing of a side differs between
  /// heads), head_dim the elements and head_width the room of an output. blocks: of 8 warps.
  AttentionLaunch common;
  int query_width = 0;  // elements from one head of q to the next, a multiple of kTileCols
  KvPool keys;          // k, of one head where it is latent
  KvPool values;        // v; or k, of which values are rebuilt
  int head_dim = 0;     // of K and V that are rebuilt; and its head_width()
  int head_width = 0;
  HeadFactor key_factor;  // rows in the order of rotary_tiles() where keys are rotated
  HeadFactor value_factor;
  Rotation rotation;                  // of all positions, of rebuilt keys; half = 0: none
  const float* key_gain = nullptr;    // of a norm of rebuilt keys: [head_dim], or, where there are
  const float* key_scales = nullptr;  // scales, [kv_heads, head_dim]; and 1 / rms of every slot
  float key_eps = 0.0f;
  float* totals = nullptr;  // latent_totals_bytes(), scratch
};
int launch_latent_attention(const LatentAttentionLaunch& args, Stream stream);

}  // namespace deinfer::cuda

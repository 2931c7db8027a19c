// What the attention kernels share: the query rows of a warp, online softmax over chunks of
// positions (FlashAttention-2, arXiv 2307.08691), states of splits and how they are merged.
#pragma once

#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mma.cuh"

namespace deinfer::cuda {

inline constexpr int kChunk = 32;  // positions at a time
static_assert(kSplitPositions % kChunk == 0, "splits are whole chunks");

/// Combines the tiles whose splits were divided; attention.cu.
int launch_combine(const AttentionLaunch& args, Stream stream);

/// How a split's state joins those before it: state * old + split * added.
struct Weights {
  float maximum, old, added;
};

__device__ __forceinline__ Weights merge_weights(float before, float split) {
  const float maximum = fmaxf(before, split);
  const float base = maximum == -INFINITY ? 0.0f : maximum;  // nothing was visible
  return {maximum, __expf(before - base), __expf(split - base)};
}

__device__ __forceinline__ float merged(float before, float split, const Weights& weights) {
  return __fmaf_rn(before, weights.old, __fmul_rn(split, weights.added));
}

/// What a lane knows of its two query rows, lane / 4 and 8 further of the tile.
struct QueryRows {
  int token[2];  // in the batch
  int head[2];
  int position[2];
  bool valid[2];
};

/// A task's rows of one kv head, and the positions that they see together: from where the first row
/// does to where the last one does.
struct QueryTile {
  const int* table;  // of blocks
  int rows, begin, end;
  QueryRows own;
};

__device__ __forceinline__ QueryTile query_tile(const AttentionLaunch& args,
                                                const AttentionTask& task, int kv_head) {
  const int group = args.heads / args.kv.kv_heads;
  const AttentionSequence sequence = args.step.sequences[task.sequence];
  QueryTile tile;
  tile.table = args.step.tables + sequence.table;
  const int all_rows = sequence.num_rows * group;
  tile.rows = min(kQueryRows, all_rows - task.tile * kQueryRows);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_tile = lane_id() / 4 + 8 * i;
    tile.own.valid[i] = in_tile < tile.rows;
    const int r = task.tile * kQueryRows + min(in_tile, tile.rows - 1);
    tile.own.token[i] = sequence.first_row + r / group;
    tile.own.position[i] = sequence.first_position + r / group;
    tile.own.head[i] = kv_head * group + r % group;
  }
  const int first_token = task.tile * kQueryRows / group;
  const int last_token = (task.tile * kQueryRows + tile.rows - 1) / group;
  tile.end = sequence.first_position + last_token + 1;
  tile.begin =
      args.window > 0 ? max(0, sequence.first_position + first_token - args.window + 1) : 0;
  return tile;
}

/// Maxima and sums of exponentials of a lane's two rows; sums are its own until finish_sums().
struct RowStats {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
};

/// Of the mma of a chunk's scores: column 2 quad, 2 quad + 1 of scores[j] is position
/// base + 8 quad + 2 j and the next, so that a lane has the scores of 8 neighbours, whose values it
/// loads at once. This is the position whose key lane `row` of tile j loads.
__device__ __forceinline__ int key_of_lane(int base, int j) {
  const int row = lane_id() / 4;
  return base + row / 2 * 8 + 2 * j + row % 2;
}

/// The place of a position in a sequence's part of the pool.
__device__ __forceinline__ int slot_of(const int* table, int block_size, int position) {
  return table[position / block_size] * block_size + position % block_size;
}

/// Scores of the 32 positions from `base` on become p = exp(score - maximum), as an mma takes them;
/// what was summed before is to be multiplied with `shrink`.
__device__ __forceinline__ void soften(const AttentionLaunch& args, const QueryRows& rows, int base,
                                       float (&scores)[4][4], RowStats& stats, float (&shrink)[2],
                                       uint4 (&p)[2]) {
  const int quad = lane_id() % 4;
  float chunk_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = base + quad * 8 + 2 * j + e % 2;
      const int position = rows.position[e / 2];
      const bool seen = key <= position && (args.window == 0 || key > position - args.window);
      const float score = soft_capped(scores[j][e] * args.scale, args.soft_cap);
      scores[j][e] = seen ? score : -INFINITY;
      chunk_max[e / 2] = fmaxf(chunk_max[e / 2], scores[j][e]);
    }
  }
  float base_max[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    chunk_max[i] = fmaxf(chunk_max[i], __shfl_xor_sync(kAllLanes, chunk_max[i], 1));
    chunk_max[i] = fmaxf(chunk_max[i], __shfl_xor_sync(kAllLanes, chunk_max[i], 2));
    const float larger = fmaxf(stats.maximum[i], chunk_max[i]);
    base_max[i] = larger == -INFINITY ? 0.0f : larger;
    shrink[i] = __expf(stats.maximum[i] - base_max[i]);
    stats.maximum[i] = larger;
    stats.sum[i] *= shrink[i];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[j][e] = __expf(scores[j][e] - base_max[e / 2]);
      stats.sum[e / 2] += scores[j][e];
    }
  }
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    p[s] = {pack_bf16(scores[2 * s][0], scores[2 * s][1]),
            pack_bf16(scores[2 * s][2], scores[2 * s][3]),
            pack_bf16(scores[2 * s + 1][0], scores[2 * s + 1][1]),
            pack_bf16(scores[2 * s + 1][2], scores[2 * s + 1][3])};
  }
}

__device__ __forceinline__ void finish_sums(RowStats& stats) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    stats.sum[i] += __shfl_xor_sync(kAllLanes, stats.sum[i], 1);
    stats.sum[i] += __shfl_xor_sync(kAllLanes, stats.sum[i], 2);
  }
}

/// Zeroes values of keys from `keys` on (of 8).
__device__ __forceinline__ uint4 first_keys(uint4 v, int keys) {
  auto masked = [keys](unsigned pair, int first) {
    return keys > first + 1 ? pair : keys > first ? pair & 0xffffu : 0u;
  };
  return {masked(v.x, 0), masked(v.y, 2), masked(v.z, 4), masked(v.w, 6)};
}

/// acc[kTiles * 8] = acc * shrink + p V of the first `tiles` tiles of columns. `from`: this lane's
/// 8 neighbours in its column of the first tile, of which `left` belong to the sequence; columns
/// are `stride` elements apart. Values beyond the sequence are somebody else's, or nobody's: not
/// even zero times them.
template <int kTiles>
__device__ __forceinline__ void add_values(const __nv_bfloat16* from, std::int64_t stride, int left,
                                           const float (&shrink)[2], const uint4 (&p)[2],
                                           float (&acc)[kTiles][4], int tiles = kTiles) {
#pragma unroll
  for (int d = 0; d < kTiles; ++d) {
    if (d >= tiles) break;
    uint4 v = *reinterpret_cast<const uint4*>(from + std::int64_t{d} * 8 * stride);
    if (left < 8) v = first_keys(v, left);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[d][e] *= shrink[e / 2];
    mma_bf16(acc[d], p[0], v.x, v.y);
    mma_bf16(acc[d], p[1], v.z, v.w);
  }
}

/// Leaves the state of a split of a task for combine_kernel: of kTiles tiles of columns from
/// `first_col` on, with the rows' stats where that is 0.
template <int kTiles>
__device__ __forceinline__ void store_partial(const AttentionLaunch& args,
                                              const AttentionTask& task, const QueryTile& tile,
                                              int split, int kv_head, int first_col,
                                              const RowStats& stats,
                                              const float (&acc)[kTiles][4]) {
  const KvPool& kv = args.kv;
  const int quad = lane_id() % 4;
  const int first = task.partial + ((split - task.first_split) * kv.kv_heads + kv_head) * tile.rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!tile.own.valid[i]) continue;
    const std::int64_t at = first + lane_id() / 4 + 8 * i;
    if (first_col == 0 && quad == 0) {
      args.partial_stats[2 * at] = stats.maximum[i];
      args.partial_stats[2 * at + 1] = stats.sum[i];
    }
#pragma unroll
    for (int d = 0; d < kTiles; ++d) {
      const int col = first_col + d * 8 + quad * 2;
      if (col >= kv.head_width) break;
      args.partial_sums[at * kv.head_width + col] = acc[d][2 * i];
      args.partial_sums[at * kv.head_width + col + 1] = acc[d][2 * i + 1];
    }
  }
}

/// The stats of all splits so far, `total`, take in those of the next one.
__device__ __forceinline__ void merge_stats(RowStats& total, const RowStats& split,
                                            Weights (&weights)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weights[i] = merge_weights(total.maximum[i], split.maximum[i]);
    total.maximum[i] = weights[i].maximum;
    total.sum[i] = merged(total.sum[i], split.sum[i], weights[i]);
  }
}

__device__ __forceinline__ float4 merged(const float4& before, const float (&split)[4],
                                         const Weights (&weights)[2]) {
  return make_float4(merged(before.x, split[0], weights[0]), merged(before.y, split[1], weights[0]),
                     merged(before.z, split[2], weights[1]),
                     merged(before.w, split[3], weights[1]));
}

/// Where element `col` of a token's output lies: in activations, or in rows.
__device__ __forceinline__ std::int64_t out_offset(const AttentionLaunch& args, int token,
                                                   int col) {
  if (args.out_chunks > 0) return activation_offset(token, col, args.out_chunks);
  return std::int64_t{token} * args.heads * args.kv.head_dim + col;
}

/// Writes a lane's four elements of a tile of columns from `first_col` on.
__device__ __forceinline__ void store_output(const AttentionLaunch& args, const QueryRows& rows,
                                             int first_col, const float4& result,
                                             const RowStats& total) {
  const float values[4] = {result.x, result.y, result.z, result.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int dim = first_col + lane_id() % 4 * 2 + e % 2;
    if (!rows.valid[e / 2] || dim >= args.kv.head_dim) continue;
    const int col = rows.head[e / 2] * args.kv.head_dim + dim;
    store_bf16(args.out, out_offset(args, rows.token[e / 2], col), values[e] / total.sum[e / 2]);
  }
}

}  // namespace deinfer::cuda

// Causal attention over paged KV on tensor cores; online softmax (FlashAttention-2, arXiv
// 2307.08691) within splits of fixed position, which are then combined in order, by the same warp
// or by another kernel: with the same bits.
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mma.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kChunk = 32;  // positions at a time
static_assert(kSplitPositions % kChunk == 0, "splits are whole chunks");

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

/// What a lane knows of its two query rows: rows lane / 4 and 8 further of the tile.
struct QueryRows {
  int token[2];  // in the batch
  int head[2];
  int position[2];
  bool valid[2];
};

/// Where element `col` of a token's output lies: in activations, or in rows.
__device__ __forceinline__ std::int64_t out_offset(const AttentionLaunch& args, int token,
                                                   int col) {
  if (args.out_chunks > 0) return activation_offset(token, col, args.out_chunks);
  return std::int64_t{token} * args.heads * args.kv.head_dim + col;
}

/// Zeroes values of keys from `keys` on (of 8).
__device__ __forceinline__ uint4 first_keys(uint4 v, int keys) {
  auto masked = [keys](unsigned pair, int first) {
    return keys > first + 1 ? pair : keys > first ? pair & 0xffffu : 0u;
  };
  return {masked(v.x, 0), masked(v.y, 2), masked(v.z, 4), masked(v.w, 6)};
}

template <int kWidth, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 1) attention_kernel(const AttentionLaunch args) {
  constexpr int kDimChunks = kWidth / kTileCols;
  constexpr int kDimTiles = kWidth / 8;
  // Where registers suffice; else they come from the cache for every chunk of keys.
  constexpr bool kKeepsQueries = kWidth <= 128;
  constexpr int kDimKept = kKeepsQueries ? kDimChunks : 1;
  // Sums over the splits so far: each lane has its own.
  __shared__ float4 totals[kWarps][kDimTiles][kWarp];
  const int lane = lane_id();
  const int row = lane / 4;
  const int quad = lane % 4;
  const KvPool& kv = args.kv;
  const int group = args.heads / kv.kv_heads;
  const int num_tasks = *args.step.num_tasks;
  float4(*total)[kWarp] = totals[warp_id()];

  for (int index = static_cast<int>(blockIdx.x) * kWarps + warp_id();
       index < num_tasks * kv.kv_heads; index += static_cast<int>(gridDim.x) * kWarps) {
    const AttentionTask task = args.step.tasks[index % num_tasks];
    const int kv_head = index / num_tasks;
    const AttentionSequence sequence = args.step.sequences[task.sequence];
    const int* table = args.step.tables + sequence.table;
    const int all_rows = sequence.num_rows * group;
    const int tile_rows = min(kQueryRows, all_rows - task.tile * kQueryRows);
    QueryRows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int in_tile = row + 8 * i;
      rows.valid[i] = in_tile < tile_rows;
      const int r = task.tile * kQueryRows + min(in_tile, tile_rows - 1);
      rows.token[i] = sequence.first_row + r / group;
      rows.position[i] = sequence.first_position + r / group;
      rows.head[i] = kv_head * group + r % group;
    }
    // What the tile sees: from where its first row does to where its last one does.
    const int first_token = task.tile * kQueryRows / group;
    const int last_token = (task.tile * kQueryRows + tile_rows - 1) / group;
    const int end = sequence.first_position + last_token + 1;
    const int begin =
        args.window > 0 ? max(0, sequence.first_position + first_token - args.window + 1) : 0;

    const uint4* queries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t place = std::int64_t{rows.token[i]} * args.heads + rows.head[i];
      queries[i] = static_cast<const uint4*>(args.q) + place * (kWidth / 8) + quad;
    }
    uint4 kept[kDimKept][2];
    if (kKeepsQueries) {
#pragma unroll
      for (int c = 0; c < kDimChunks; ++c) {
        kept[c][0] = queries[0][c * 4];
        kept[c][1] = queries[1][c * 4];
      }
    }

    float total_max[2] = {-INFINITY, -INFINITY};
    float total_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) total[d][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    for (int split = task.first_split; split < task.first_split + task.num_splits; ++split) {
      float maximum[2] = {-INFINITY, -INFINITY};
      float sum[2] = {0.0f, 0.0f};
      float acc[kDimTiles][4] = {};
      const int split_end = min((split + 1) * kSplitPositions, end);
      for (int base = max(split * kSplitPositions, begin / kChunk * kChunk); base < split_end;
           base += kChunk) {
        // Columns 2 quad, 2 quad + 1 of scores[j] are positions base + 8 quad + 2 j and the next:
        // so a lane has the scores of 8 neighbours, whose values it loads at once.
        float scores[4][4] = {};
        const uint4* keys[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int key = min(base + row / 2 * 8 + 2 * j + row % 2, end - 1);
          const int slot = table[key / kv.block_size] * kv.block_size + key % kv.block_size;
          keys[j] = static_cast<const uint4*>(kv.k) + key_offset(kv, slot, kv_head) / 8 + quad;
        }
        // Where queries are not kept, a loop that is one: else the compiler loads all of them
        // before the loop over keys, for which there are no registers.
#pragma unroll kDimKept
        for (int c = 0; c < kDimChunks; ++c) {
          const uint4 low = kKeepsQueries ? kept[c % kDimKept][0] : queries[0][c * 4];
          const uint4 high = kKeepsQueries ? kept[c % kDimKept][1] : queries[1][c * 4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint4 k = keys[j][c * 4];
            mma_bf16(scores[j], {low.x, high.x, low.y, high.y}, k.x, k.y);
            mma_bf16(scores[j], {low.z, high.z, low.w, high.w}, k.z, k.w);
          }
        }
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
        float shrink[2];
        float base_max[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          chunk_max[i] = fmaxf(chunk_max[i], __shfl_xor_sync(kAllLanes, chunk_max[i], 1));
          chunk_max[i] = fmaxf(chunk_max[i], __shfl_xor_sync(kAllLanes, chunk_max[i], 2));
          const float larger = fmaxf(maximum[i], chunk_max[i]);
          base_max[i] = larger == -INFINITY ? 0.0f : larger;
          shrink[i] = __expf(maximum[i] - base_max[i]);
          maximum[i] = larger;
          sum[i] *= shrink[i];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[j][e] = __expf(scores[j][e] - base_max[e / 2]);
            sum[e / 2] += scores[j][e];
          }
        }
        uint4 p[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          p[s] = {pack_bf16(scores[2 * s][0], scores[2 * s][1]),
                  pack_bf16(scores[2 * s][2], scores[2 * s][3]),
                  pack_bf16(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                  pack_bf16(scores[2 * s + 1][2], scores[2 * s + 1][3])};
        }
        // Values beyond the sequence are somebody else's, or nobody's: not even zero times them.
        const int left = end - (base + quad * 8);
        const int key = min(base + quad * 8, (end - 1) / 8 * 8);
        const int slot = table[key / kv.block_size] * kv.block_size + key % kv.block_size;
        const auto* from =
            static_cast<const __nv_bfloat16*>(kv.v) + value_offset(kv, slot, kv_head, row);
#pragma unroll
        for (int d = 0; d < kDimTiles; ++d) {
          uint4 v = *reinterpret_cast<const uint4*>(from + std::int64_t{d} * 8 * kv.block_size);
          if (left < 8) v = first_keys(v, left);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[d][e] *= shrink[e / 2];
          mma_bf16(acc[d], p[0], v.x, v.y);
          mma_bf16(acc[d], p[1], v.z, v.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
        sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
      }
      if (task.partial >= 0) {
        const int first =
            task.partial + ((split - task.first_split) * kv.kv_heads + kv_head) * tile_rows;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!rows.valid[i]) continue;
          const std::int64_t at = first + row + 8 * i;
          if (quad == 0) {
            args.partial_stats[2 * at] = maximum[i];
            args.partial_stats[2 * at + 1] = sum[i];
          }
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            args.partial_sums[at * kWidth + d * 8 + quad * 2] = acc[d][2 * i];
            args.partial_sums[at * kWidth + d * 8 + quad * 2 + 1] = acc[d][2 * i + 1];
          }
        }
        continue;
      }
      Weights weights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[i] = merge_weights(total_max[i], maximum[i]);
        total_max[i] = weights[i].maximum;
        total_sum[i] = merged(total_sum[i], sum[i], weights[i]);
      }
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) {
        const float4 before = total[d][lane];
        total[d][lane] = make_float4(
            merged(before.x, acc[d][0], weights[0]), merged(before.y, acc[d][1], weights[0]),
            merged(before.z, acc[d][2], weights[1]), merged(before.w, acc[d][3], weights[1]));
      }
    }
    if (task.partial >= 0) continue;
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
      const float4 result = total[d][lane];
      const float values[4] = {result.x, result.y, result.z, result.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int dim = d * 8 + quad * 2 + e % 2;
        if (!rows.valid[e / 2] || dim >= kv.head_dim) continue;
        const int col = rows.head[e / 2] * kv.head_dim + dim;
        store_bf16(args.out, out_offset(args, rows.token[e / 2], col),
                   values[e] / total_sum[e / 2]);
      }
    }
  }
}

constexpr int kCombineThreads = 128;

__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const AttentionLaunch args) {
  const KvPool& kv = args.kv;
  const int group = args.heads / kv.kv_heads;
  const int width = kv.head_width;
  const int count = *args.step.num_combines * kv.kv_heads;
  for (int index = static_cast<int>(blockIdx.x); index < count;
       index += static_cast<int>(gridDim.x)) {
    const AttentionTask task = args.step.combines[index / kv.kv_heads];
    const int kv_head = index % kv.kv_heads;
    const AttentionSequence sequence = args.step.sequences[task.sequence];
    const int tile_rows = min(kQueryRows, sequence.num_rows * group - task.tile * kQueryRows);
    for (int e = static_cast<int>(threadIdx.x); e < tile_rows * kv.head_dim; e += kCombineThreads) {
      const int row = e / kv.head_dim;
      const int dim = e % kv.head_dim;
      float maximum = -INFINITY;
      float sum = 0.0f;
      float total = 0.0f;
      for (int split = 0; split < task.num_splits; ++split) {
        const std::int64_t at = task.partial + (split * kv.kv_heads + kv_head) * tile_rows + row;
        const Weights weights = merge_weights(maximum, args.partial_stats[2 * at]);
        maximum = weights.maximum;
        sum = merged(sum, args.partial_stats[2 * at + 1], weights);
        total = merged(total, args.partial_sums[at * width + dim], weights);
      }
      const int r = task.tile * kQueryRows + row;
      const int col = (kv_head * group + r % group) * kv.head_dim + dim;
      store_bf16(args.out, out_offset(args, sequence.first_row + r / group, col), total / sum);
    }
  }
}

}  // namespace

int load_attention_kernels() {
  return first_failure({load(attention_kernel<64, 4>), load(attention_kernel<96, 4>),
                        load(attention_kernel<128, 4>), load(attention_kernel<256, 2>),
                        load(combine_kernel)});
}

int launch_attention(const AttentionLaunch& args, Stream stream) {
  int status = 0;
  switch (args.kv.head_width) {
    case 64:
      status = launch(stream, grid_of(args.blocks), 4 * kWarp, attention_kernel<64, 4>, args);
      break;
    case 96:
      status = launch(stream, grid_of(args.blocks), 4 * kWarp, attention_kernel<96, 4>, args);
      break;
    case 128:
      status = launch(stream, grid_of(args.blocks), 4 * kWarp, attention_kernel<128, 4>, args);
      break;
    default:
      status = launch(stream, grid_of(args.blocks), 2 * kWarp, attention_kernel<256, 2>, args);
  }
  if (status != 0) return status;
  return launch(stream, grid_of(args.blocks), kCombineThreads, combine_kernel, args);
}

}  // namespace deinfer::cuda

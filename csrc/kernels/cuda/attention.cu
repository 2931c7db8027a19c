// Causal attention over paged KV on tensor cores: online softmax within splits of fixed position,
// which are then combined in order, by the same warp or by another kernel: with the same bits.
#include "kernels/cuda/attention.cuh"

namespace deinfer::cuda {
namespace {

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
  const int num_tasks = *args.step.num_tasks;
  float4(*total)[kWarp] = totals[warp_id()];

  for (int index = static_cast<int>(blockIdx.x) * kWarps + warp_id();
       index < num_tasks * kv.kv_heads; index += static_cast<int>(gridDim.x) * kWarps) {
    const AttentionTask task = args.step.tasks[index % num_tasks];
    const int kv_head = index / num_tasks;
    const QueryTile tile = query_tile(args, task, kv_head);
    const int end = tile.end;

    const uint4* queries[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t place = std::int64_t{tile.own.token[i]} * args.heads + tile.own.head[i];
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

    RowStats total_stats;
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) total[d][lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    for (int split = task.first_split; split < task.first_split + task.num_splits; ++split) {
      RowStats stats;
      float acc[kDimTiles][4] = {};
      const int split_end = min((split + 1) * kSplitPositions, end);
      for (int base = max(split * kSplitPositions, tile.begin / kChunk * kChunk); base < split_end;
           base += kChunk) {
        float scores[4][4] = {};
        const uint4* keys[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int slot = slot_of(tile.table, kv.block_size, min(key_of_lane(base, j), end - 1));
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
        float shrink[2];
        uint4 p[2];
        soften(args, tile.own, base, scores, stats, shrink, p);
        const int slot =
            slot_of(tile.table, kv.block_size, min(base + quad * 8, (end - 1) / 8 * 8));
        const auto* from =
            static_cast<const __nv_bfloat16*>(kv.v) + value_offset(kv, slot, kv_head, row);
        add_values(from, kv.block_size, end - (base + quad * 8), shrink, p, acc);
      }
      finish_sums(stats);
      if (task.partial >= 0) {
        store_partial(args, task, tile, split, kv_head, 0, stats, acc);
        continue;
      }
      Weights weights[2];
      merge_stats(total_stats, stats, weights);
#pragma unroll
      for (int d = 0; d < kDimTiles; ++d) total[d][lane] = merged(total[d][lane], acc[d], weights);
    }
    if (task.partial >= 0) continue;
#pragma unroll
    for (int d = 0; d < kDimTiles; ++d) {
      store_output(args, tile.own, d * 8, total[d][lane], total_stats);
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
  return status != 0 ? status : launch_combine(args, stream);
}

int launch_combine(const AttentionLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.blocks), kCombineThreads, combine_kernel, args);
}

}  // namespace deinfer::cuda

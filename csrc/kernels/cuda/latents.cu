// Causal attention over latents of K and V: absorbed ones are attended to as they are (arXiv
// 2405.04434), others become K and V of some positions at a time in shared memory.
#include "kernels/cuda/rebuild.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kWarps = kRebuildWarps;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPartTiles = 16;  // tiles of columns of the output that a warp has
constexpr int kPartCols = kPartTiles * 8;
static_assert(latent_totals_bytes(1) == sizeof(float) * kWarps * kQueryRows * kPartCols);

/// Work for one block: tasks [first, first + count) of one kv head and some columns.
struct Bundle {
  int first, count, kv_head, first_part;
};

/// A warp's part of a task: 16 rows, and up to kPartCols columns of their outputs.
struct WarpPart {
  AttentionTask task;
  QueryTile tile;
  int kv_head;
  int first_col;
  int tiles;  // of columns
};

/// Adds the 32 positions from `base` on to a split's state; what is rebuilt is in shared memory
/// from position `step` on.
template <int kWidth>
__device__ __forceinline__ void attend(const LatentAttentionLaunch& args, const WarpPart& part,
                                       int base, int step, const Rebuilt<kWidth>& rebuilt,
                                       RowStats& stats, float (&acc)[kPartTiles][4]) {
  using Memory = Rebuilt<kWidth>;
  const int row = lane_id() / 4;
  const int quad = lane_id() % 4;
  const int end = part.tile.end;
  const int* table = part.tile.table;
  const bool rebuilds_keys = args.key_factor.w != nullptr;
  const uint4* keys[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int key = min(key_of_lane(base, j), end - 1);
    if (rebuilds_keys) {
      keys[j] = rebuilt.keys + (key - step) * (Memory::kKeyWidth / 8) + quad;
    } else {
      const int slot = slot_of(table, args.keys.block_size, key);
      const int head = args.keys.kv_heads == 1 ? 0 : part.kv_head;
      keys[j] =
          static_cast<const uint4*>(args.keys.k) + key_offset(args.keys, slot, head) / 8 + quad;
    }
  }
  const uint4* queries[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t place =
        std::int64_t{part.tile.own.token[i]} * args.common.heads + part.tile.own.head[i];
    queries[i] = static_cast<const uint4*>(args.common.q) + place * (args.query_width / 8) + quad;
  }
  const int width = rebuilds_keys ? args.head_width : args.keys.head_width;
  float scores[4][4] = {};
#pragma unroll 1
  for (int c = 0; c < args.query_width / kTileCols; ++c) {
    const uint4 low = queries[0][c * 4];
    const uint4 high = queries[1][c * 4];
    const bool inside = c * kTileCols + quad * 8 < width;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 k = inside ? keys[j][c * 4] : uint4{0, 0, 0, 0};
      mma_bf16(scores[j], {low.x, high.x, low.y, high.y}, k.x, k.y);
      mma_bf16(scores[j], {low.z, high.z, low.w, high.w}, k.z, k.w);
    }
  }
  if (args.key_gain != nullptr) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[j][e] *= rebuilt.scales[base - step + quad * 8 + 2 * j + e % 2];
      }
    }
  }
  float shrink[2];
  uint4 p[2];
  soften(args.common, part.tile.own, base, scores, stats, shrink, p);

  const int key = min(base + quad * 8, (end - 1) / 8 * 8);
  const int col = part.first_col + row;
  const __nv_bfloat16* from;
  std::int64_t stride = args.values.block_size;
  if (args.value_factor.w != nullptr) {
    stride = Memory::kValueWidth;
    from = reinterpret_cast<const __nv_bfloat16*>(rebuilt.values) + col * stride + (key - step);
  } else {
    const int slot = slot_of(table, args.values.block_size, key);
    const int head = args.values.kv_heads == 1 ? 0 : part.kv_head;
    from = static_cast<const __nv_bfloat16*>(args.values.v) +
           value_offset(args.values, slot, head, col);
  }
  add_values(from, stride, end - (base + quad * 8), shrink, p, acc, part.tiles);
}

/// Tasks of one sequence that see all of their splits, or one task, or any where nothing is
/// rebuilt: a warp each, or several that divide the columns. All warps of the block must call it.
template <bool kInt8, int kWidth>
__device__ __forceinline__ void run_bundle(const LatentAttentionLaunch& args, const Bundle& bundle,
                                           int parts, int columns, Rebuilt<kWidth>& rebuilt) {
  constexpr int kPositions = Rebuilt<kWidth>::kPositions;
  const AttentionLaunch& common = args.common;
  const bool rebuilds = args.key_factor.w != nullptr || args.value_factor.w != nullptr;
  const int which = warp_id() / parts;
  WarpPart part;
  part.kv_head = bundle.kv_head;
  part.first_col = (bundle.first_part + warp_id() % parts) * kPartCols;
  const bool attends = which < bundle.count && part.first_col < columns;
  part.tiles = min(kPartTiles, tiles_of(columns - part.first_col, 8));
  part.task = common.step.tasks[bundle.first + (which < bundle.count ? which : 0)];
  part.tile = query_tile(common, part.task, bundle.kv_head);
  const int first_split = part.task.first_split;
  const int end_split = first_split + part.task.num_splits;

  // What the block goes through: of what is rebuilt, all that one of its tasks sees. Their tiles
  // follow one another, so that the first begins first and the last ends last.
  int begin = part.tile.begin, end = part.tile.end, from_split = first_split, to_split = end_split;
  if (rebuilds) {
    const AttentionTask first = common.step.tasks[bundle.first];
    const AttentionTask last = common.step.tasks[bundle.first + bundle.count - 1];
    begin = query_tile(common, first, bundle.kv_head).begin;
    end = query_tile(common, last, bundle.kv_head).end;
    from_split = first.first_split;
    to_split = last.first_split + last.num_splits;
  } else if (!attends) {
    return;
  }

  RowStats total_stats;
  // Each lane has its own.
  float4* const total =
      reinterpret_cast<float4*>(args.totals) +
      (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_id()) * (kPartTiles * kWarp) +
      lane_id();
#pragma unroll 1
  for (int split = from_split; split < to_split; ++split) {
    const bool sees = attends && first_split <= split && split < end_split;
    RowStats stats;
    float acc[kPartTiles][4] = {};
    const int split_end = min((split + 1) * kSplitPositions, end);
#pragma unroll 1
    for (int step = max(split * kSplitPositions, begin / kChunk * kChunk); step < split_end;
         step += kPositions) {
      const int step_end = min(step + kPositions, split_end);
      if (rebuilds) {
        const int* table = part.tile.table;  // the same sequence's in all warps
        __syncthreads();                     // what was there before has been read
        if (args.key_factor.w != nullptr) {
          rebuild_keys<kInt8>(args, table, bundle.kv_head, step, step_end, rebuilt);
          if (args.key_gain != nullptr) {
            __syncthreads();
            scale_keys(args, table, step, step_end, rebuilt);
          }
        }
        if (args.value_factor.w != nullptr) {
          rebuild_values<kInt8>(args, table, bundle.kv_head, step, step_end, rebuilt);
        }
        __syncthreads();
      }
      if (!sees) continue;
      const int own_end = min(step_end, part.tile.end);
#pragma unroll 1
      for (int base = max(step, part.tile.begin / kChunk * kChunk); base < own_end;
           base += kChunk) {
        attend(args, part, base, step, rebuilt, stats, acc);
      }
    }
    if (!sees) continue;
    finish_sums(stats);
    if (part.task.partial >= 0) {
      store_partial(common, part.task, part.tile, split, part.kv_head, part.first_col, stats, acc);
      continue;
    }
    Weights weights[2];
    merge_stats(total_stats, stats, weights);
#pragma unroll
    for (int d = 0; d < kPartTiles; ++d) {
      if (d >= part.tiles) break;
      float4 before = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (split > first_split) before = total[d * kWarp];
      total[d * kWarp] = merged(before, acc[d], weights);
    }
  }
  if (!attends || part.task.partial >= 0) return;
  for (int d = 0; d < kPartTiles; ++d) {  // columns beyond those of V are the output's padding
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    store_output(common, part.tile.own, part.first_col + d * 8,
                 d < part.tiles ? total[d * kWarp] : zero, total_stats);
  }
}

template <int kWidth, bool kInt8>
__global__ void __launch_bounds__(kThreads, 1)
    latent_attention_kernel(const LatentAttentionLaunch args) {
  __shared__ Rebuilt<kWidth> rebuilt;
  const AttentionLaunch& common = args.common;
  const bool rebuilds = args.key_factor.w != nullptr || args.value_factor.w != nullptr;
  if (rebuilds) {  // elements that heads do not have, and places that nobody fills
    const int words = static_cast<int>(sizeof rebuilt / sizeof(float));
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
      reinterpret_cast<float*>(&rebuilt)[i] = 0.0f;
    }
  }
  const int columns = args.value_factor.w != nullptr ? args.head_dim : args.values.head_width;
  const int all_parts = tiles_of(columns, kPartCols);
  const int parts = min(all_parts, kWarps);
  const int most = kWarps / parts;  // tasks at once
  const int num_tasks = *common.step.num_tasks;
  const int bundles = tiles_of(num_tasks, most);
  const int per_head = bundles * tiles_of(all_parts, kWarps);
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < per_head * common.kv.kv_heads;
       index += static_cast<int>(gridDim.x)) {
    Bundle bundle;
    bundle.kv_head = index / per_head;
    bundle.first_part = index % per_head / bundles * kWarps;
    bundle.first = index % bundles * most;
    const int end = min(bundle.first + most, num_tasks);
#pragma unroll 1
    for (; bundle.first < end; bundle.first += bundle.count) {
      const AttentionTask task = common.step.tasks[bundle.first];
      bundle.count = rebuilds ? 1 : end - bundle.first;
      while (rebuilds && task.partial < 0 && bundle.first + bundle.count < end) {
        const AttentionTask next = common.step.tasks[bundle.first + bundle.count];
        if (next.sequence != task.sequence || next.partial >= 0) break;
        ++bundle.count;
      }
      run_bundle<kInt8>(args, bundle, parts, columns, rebuilt);
    }
  }
}

/// A block per token.
__global__ void __launch_bounds__(kThreads) latent_write_kernel(const LatentWriteLaunch args) {
  const int token = static_cast<int>(blockIdx.x);
  const int slot = args.slots[token];
  if (slot < 0) return;
  for (const LatentWriteLaunch::Side& side : args.sides) {
    const KvPool& pool = side.pool;
    for (int j = static_cast<int>(threadIdx.x); j < pool.head_width; j += kThreads) {
      const float value =
          load_bf16(args.z, activation_offset(token, side.chunk * kTileCols + j, args.z_chunks));
      if (pool.k != nullptr) {
        store_bf16(pool.k, key_offset(pool, slot, 0) + j, value);
      } else {
        store_bf16(pool.v, value_offset(pool, slot, 0, j), value);
      }
    }
  }
}

}  // namespace

int load_latent_kernels() {
  return first_failure({load(latent_attention_kernel<128, false>),
                        load(latent_attention_kernel<256, false>),
                        load(latent_attention_kernel<128, true>),
                        load(latent_attention_kernel<256, true>), load(latent_write_kernel)});
}

int launch_latent_attention(const LatentAttentionLaunch& args, Stream stream) {
  const bool int8 = args.key_factor.scales != nullptr || args.value_factor.scales != nullptr;
  auto run = [&](auto kernel) {
    return launch(stream, grid_of(args.common.blocks), kThreads, kernel, args);
  };
  const int status =
      args.head_width <= 128
          ? run(int8 ? latent_attention_kernel<128, true> : latent_attention_kernel<128, false>)
          : run(int8 ? latent_attention_kernel<256, true> : latent_attention_kernel<256, false>);
  return status != 0 ? status : launch_combine(args.common, stream);
}

int launch_latent_write(const LatentWriteLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, latent_write_kernel, args);
}

}  // namespace deinfer::cuda

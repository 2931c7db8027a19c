// Attention over other programs' caches: what writes them, and the division of work from lists that
// only the device has.
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;

/// A block per token.
__global__ void __launch_bounds__(kThreads) kv_write_kernel(const KvWriteLaunch args) {
  const std::int64_t token = blockIdx.x;
  const std::int64_t slot = args.slots[token];
  if (slot < 0 || slot >= args.places) return;
  const KvPool& kv = args.kv;
  for (int i = static_cast<int>(threadIdx.x); i < kv.kv_heads * kv.head_dim; i += kThreads) {
    const int head = i / kv.head_dim;
    const int d = i % kv.head_dim;
    const int place = static_cast<int>(slot);
    store_bf16(kv.k, key_offset(kv, place, head) + d, load_bf16(args.k, token * args.k_ld + i));
    store_bf16(kv.v, value_offset(kv, place, head, d), load_bf16(args.v, token * args.v_ld + i));
  }
}

/// A block per token.
__global__ void __launch_bounds__(kThreads) pad_heads_kernel(const PadHeadsLaunch args) {
  const std::int64_t token = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < args.heads * args.head_width; i += kThreads) {
    const int head = i / args.head_width;
    const int d = i % args.head_width;
    const float value =
        d < args.head_dim ? load_bf16(args.q, token * args.ld + head * args.head_dim + d) : 0.0f;
    store_bf16(args.out, token * args.heads * args.head_width + i, value);
  }
}

/// The sum of the values of the threads before, and of all.
__device__ int scan(int value, int* memory, int* total) {
  const int own = static_cast<int>(threadIdx.x);
  memory[own] = value;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const int before = own >= distance ? memory[own - distance] : 0;
    __syncthreads();
    memory[own] += before;
    __syncthreads();
  }
  const int sum = memory[own];
  *total = memory[kThreads - 1];
  __syncthreads();
  return sum - value;
}

/// One block.
__global__ void __launch_bounds__(kThreads) attention_plan_kernel(const AttentionPlanLaunch args) {
  __shared__ int memory[kThreads];
  const int own = static_cast<int>(threadIdx.x);
  int num_tiles = 0;
  for (int first = 0; first < args.num_sequences; first += kThreads) {
    const int s = first + own;
    int tiles = 0;
    if (s < args.num_sequences) {
      const int row = args.query_starts[s];
      const int rows = args.query_starts[s + 1] - row;
      args.sequences[s] = {row, rows, args.lengths[s] - rows, s * args.table_stride};
      tiles = query_tiles(rows, args.group);
    }
    int total = 0;
    const int before = scan(tiles, memory, &total);
    if (s < args.num_sequences) args.first_tiles[s] = num_tiles + before;
    num_tiles += total;
  }
  if (own == 0) args.first_tiles[args.num_sequences] = num_tiles;
  __syncthreads();
  // Tiles alone keep the device busy, or splits must. The result has the same bits.
  const bool divides = num_tiles * args.kv_heads < args.parallel_warps;
  int num_tasks = 0;
  int num_combines = 0;
  int num_partial = 0;
  for (int first = 0; first < num_tiles; first += kThreads) {
    AttentionTask task;
    TileSplits splits;
    int partial_rows = 0;
    const bool any = first + own < num_tiles;
    if (any) {
      int end = args.num_sequences;  // the last sequence that begins at or before this tile
      while (end - task.sequence > 1) {
        const int middle = (task.sequence + end) / 2;
        (args.first_tiles[middle] <= first + own ? task.sequence : end) = middle;
      }
      const AttentionSequence& sequence = args.sequences[task.sequence];
      task.tile = first + own - args.first_tiles[task.sequence];
      splits =
          splits_of(sequence.num_rows, sequence.first_position, task.tile, args.group, args.window);
      task.first_split = splits.first;
      task.num_splits = splits.count;
      if (divides && splits.count > 1) partial_rows = args.kv_heads * splits.rows * splits.count;
    }
    int total = 0;
    const int partial = num_partial + scan(partial_rows, memory, &total);
    num_partial += total;
    const bool is_divided = partial_rows > 0 && partial + partial_rows <= args.partial_rows;
    const int place = num_tasks + scan(any ? (is_divided ? splits.count : 1) : 0, memory, &total);
    num_tasks += total;
    const int combine = num_combines + scan(is_divided ? 1 : 0, memory, &total);
    num_combines += total;
    if (!any) continue;
    if (!is_divided) {
      args.tasks[place] = task;
      continue;
    }
    task.partial = partial;
    args.combines[combine] = task;
    task.num_splits = 1;
    for (int split = 0; split < splits.count; ++split) {
      task.first_split = splits.first + split;
      task.partial = partial + split * args.kv_heads * splits.rows;
      args.tasks[place + split] = task;
    }
  }
  if (own == 0) {
    args.counts[0] = num_tasks;
    args.counts[1] = num_combines;
  }
}

}  // namespace

int launch_kv_write(const KvWriteLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, kv_write_kernel, args);
}

int launch_pad_heads(const PadHeadsLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, pad_heads_kernel, args);
}

int launch_attention_plan(const AttentionPlanLaunch& args, Stream stream) {
  return launch(stream, grid_of(1), kThreads, attention_plan_kernel, args);
}

}  // namespace deinfer::cuda

// Paged attention on a CUDA device's memory: the device divides the work, which only it knows.
#include <limits>
#include <utility>

#include "base/bf16.h"
#include "functional/cuda_checks.h"
#include "functional/executor_impl.h"
#include "kernels/cuda/attention_plan.h"

namespace deinfer {
namespace {

using cuda::AttentionTask;

constexpr int kPartialRows = 16384;
constexpr int kWarpsPerMultiprocessor = 8;  // that attention wants to have work for
constexpr int kBlocksPerMultiprocessor = 4;
constexpr std::int64_t kMost = std::numeric_limits<int>::max() / 2;

void check_cache(const CudaPagedCache& cache) {
  check_argument(cache.num_blocks > 0 && cache.kv_heads > 0 && cache.head_dim > 0, "the cache has ",
                 cache.num_blocks, " blocks, ", cache.kv_heads, " kv heads and head_dim ",
                 cache.head_dim);
  check_argument(cache.block_size > 0 && cache.block_size % 16 == 0 &&
                     cache.num_blocks <= kMost / cache.block_size,
                 "block_size must be a multiple of 16, and all places fit an int, not ",
                 cache.num_blocks, " blocks of ", cache.block_size);
  for (const void* side : {cache.k, cache.v}) {
    check_argument(side != nullptr, "the cache has no memory");
    check_memory("the cache", side, 0, 0);
  }
}

cuda::KvPool pool_of(const CudaPagedCache& cache) {
  return {cache.k,        cache.v,        cache.block_size,
          cache.kv_heads, cache.head_dim, cuda_head_width(cache.head_dim)};
}

/// Bytes before the parts of a workspace.
struct AttentionMemory {
  std::size_t partial_sums, partial_stats, first_tiles, counts, tasks, combines, sequences, queries;
  std::size_t bytes = 0;

  AttentionMemory(std::int64_t m, int heads, const CudaPagedCache& cache, std::int64_t count) {
    check_cache(cache);
    check_argument(heads > 0 && heads % cache.kv_heads == 0, "there are ", heads,
                   " heads, no multiple of ", cache.kv_heads, " kv heads");
    check_argument(0 <= m && m <= kMost / heads && 0 <= count && count <= kMost, "q has ", m,
                   " rows of ", count, " sequences");
    const auto width = static_cast<std::size_t>(cuda_head_width(cache.head_dim));
    const auto rows = static_cast<std::size_t>(m);
    const auto groups = static_cast<std::size_t>(heads / cache.kv_heads);
    const auto all = static_cast<std::size_t>(count);
    // A sequence's last tile may be half empty; every partial task has its own rows.
    const std::size_t tiles = rows * groups / cuda::kQueryRows + all;
    auto take = [&](std::size_t size) {
      return std::exchange(bytes, bytes + (size + 15) / 16 * 16);
    };
    partial_sums = take(kPartialRows * width * sizeof(float));
    partial_stats = take(kPartialRows * 2 * sizeof(float));
    first_tiles = take((all + 1) * sizeof(int));
    counts = take(2 * sizeof(int));
    tasks = take((tiles + kPartialRows / static_cast<std::size_t>(cache.kv_heads)) *
                 sizeof(AttentionTask));
    combines = take(tiles * sizeof(AttentionTask));
    sequences = take(all * sizeof(cuda::AttentionSequence));
    queries = take(rows * static_cast<std::size_t>(heads) * width * sizeof(bf16));
  }
};

}  // namespace

int DEINFER_ABI::cuda_head_width(std::int64_t head_dim) {
  const int width =
      0 < head_dim && head_dim <= 256 ? cuda::head_width(static_cast<int>(head_dim)) : 0;
  if (width == 0) {
    fail(ErrorCode::kUnsupported, "head_dim=", head_dim,
         " is not in [1, 256], which the CUDA kernels take");
  }
  return width;
}

void DEINFER_ABI::cuda_write_kv(const TensorView& k, const TensorView& v, const std::int64_t* slots,
                                const CudaPagedCache& cache, const CudaStream& on) {
  check_cache(cache);
  const std::int64_t cols = std::int64_t{cache.kv_heads} * cache.head_dim;
  for (const TensorView* side : {&k, &v}) {
    const char* name = side == &k ? "k" : "v";
    check_matrix(name, *side);
    check_bfloat16(name, side->dtype);
    check_argument(side->rows == k.rows && side->cols == cols, name, " has shape [", side->rows,
                   ", ", side->cols, "], not [", k.rows, ", ", cols, "]");
  }
  check_argument(slots != nullptr || k.rows == 0, "slots has no data");
  if (k.rows == 0) return;
  cuda::use_device(on.device);
  cuda::KvWriteLaunch launch;
  launch.k = k.data;
  launch.v = v.data;
  launch.k_ld = k.row_stride;
  launch.v_ld = v.row_stride;
  launch.m = static_cast<int>(k.rows);
  launch.slots = slots;
  launch.places = cache.num_blocks * cache.block_size;
  launch.kv = pool_of(cache);
  cuda::check_launch(cuda::launch_kv_write(launch, stream_of(on)), "writing of K and V");
}

std::size_t DEINFER_ABI::cuda_attention_workspace_bytes(std::int64_t m, int heads,
                                                        const CudaPagedCache& cache,
                                                        std::int64_t sequences) {
  return AttentionMemory(m, heads, cache, sequences).bytes;
}

void DEINFER_ABI::cuda_paged_attention(const TensorView& q, const CudaPagedCache& cache,
                                       const CudaPagedSequences& sequences, float scale, int window,
                                       const MutableTensorView& out, void* workspace,
                                       std::size_t workspace_bytes, const CudaStream& on) {
  check_cache(cache);
  check_matrix("q", q);
  check_matrix("out", out);
  check_bfloat16("q", q.dtype);
  check_bfloat16("out", out.dtype);
  check_argument(
      out.rows == q.rows && out.cols == q.cols && (q.rows <= 1 || out.row_stride == q.cols),
      "out has shape [", out.rows, ", ", out.cols, "] and row stride ", out.row_stride, ", not [",
      q.rows, ", ", q.cols, "] without gaps");
  check_argument(window >= 0, "window must not be negative, got ", window);
  check_argument(q.cols % cache.head_dim == 0, "q has ", q.cols, " columns, no heads of ",
                 cache.head_dim);
  check_argument(sequences.table_stride >= 0 &&
                     sequences.table_stride <= kMost / std::max<std::int64_t>(sequences.count, 1),
                 "the block table has ", sequences.count, " rows ", sequences.table_stride,
                 " apart");
  const int heads = static_cast<int>(q.cols / cache.head_dim);
  const AttentionMemory at(q.rows, heads, cache, sequences.count);
  if (q.rows == 0 || sequences.count == 0) return;
  check_argument(sequences.query_starts != nullptr && sequences.lengths != nullptr &&
                     sequences.block_table != nullptr,
                 "query_starts, lengths or block_table has no data");
  check_memory("the workspace", workspace, workspace_bytes, at.bytes);
  cuda::use_device(on.device);
  const int multiprocessors = cuda::multiprocessors(on.device);
  auto* memory = static_cast<std::byte*>(workspace);

  cuda::AttentionPlanLaunch plan;
  plan.query_starts = sequences.query_starts;
  plan.lengths = sequences.lengths;
  plan.num_sequences = static_cast<int>(sequences.count);
  plan.table_stride = static_cast<int>(sequences.table_stride);
  plan.group = heads / cache.kv_heads;
  plan.kv_heads = cache.kv_heads;
  plan.window = window;
  plan.parallel_warps = multiprocessors * kWarpsPerMultiprocessor;
  plan.partial_rows = kPartialRows;
  plan.first_tiles = reinterpret_cast<int*>(memory + at.first_tiles);
  plan.counts = reinterpret_cast<int*>(memory + at.counts);
  plan.tasks = reinterpret_cast<AttentionTask*>(memory + at.tasks);
  plan.combines = reinterpret_cast<AttentionTask*>(memory + at.combines);
  plan.sequences = reinterpret_cast<cuda::AttentionSequence*>(memory + at.sequences);
  cuda::check_launch(cuda::launch_attention_plan(plan, stream_of(on)), "planning of attention");

  cuda::PadHeadsLaunch pad;
  pad.q = q.data;
  pad.ld = q.row_stride;
  pad.m = static_cast<int>(q.rows);
  pad.heads = heads;
  pad.head_dim = cache.head_dim;
  pad.head_width = cuda_head_width(cache.head_dim);
  pad.out = memory + at.queries;
  cuda::check_launch(cuda::launch_pad_heads(pad, stream_of(on)), "padding of q");

  cuda::AttentionLaunch launch;
  launch.step = {plan.counts,   plan.counts + 1, plan.tasks,
                 plan.combines, plan.sequences,  sequences.block_table};
  launch.q = pad.out;
  launch.kv = pool_of(cache);
  launch.heads = heads;
  launch.window = window;
  launch.scale = scale;
  launch.partial_sums = reinterpret_cast<float*>(memory + at.partial_sums);
  launch.partial_stats = reinterpret_cast<float*>(memory + at.partial_stats);
  launch.out = out.data;
  launch.blocks = multiprocessors * kBlocksPerMultiprocessor;
  cuda::check_launch(cuda::launch_attention(launch, stream_of(on)), "attention");
}

}  // namespace deinfer

// Paged attention of OpExecutor, and what writes its cache.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "functional/executor_impl.h"
#include "kernels/cpu/packing.h"

namespace deinfer {
namespace {

bool is_activation(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }

void check_cache(const PagedCache& cache) {
  check_argument(is_activation(cache.dtype), "the cache must be float32 or bfloat16, not ",
                 dtype_name(cache.dtype));
  check_argument(cache.num_blocks > 0 && cache.num_blocks <= (std::int64_t{1} << 31) - 1 &&
                     cache.kv_heads > 0 && cache.head_dim > 0,
                 "the cache has ", cache.num_blocks, " blocks, ", cache.kv_heads,
                 " kv heads and head_dim ", cache.head_dim);
  check_argument(cache.block_size > 0 && cache.block_size % cpu::kLanes == 0,
                 "block_size must be a multiple of ", cpu::kLanes, ", not ", cache.block_size);
  check_argument(cache.k != nullptr && cache.v != nullptr, "the cache has no memory");
}

KvLayer layer_of(const PagedCache& cache) {
  auto side = [&](void* data) {
    return KvSide{static_cast<std::byte*>(data),
                  {KvForm::kDense, cache.kv_heads, cache.head_dim},
                  cache.dtype,
                  cache.block_size};
  };
  return {side(cache.k), side(cache.v)};
}

/// Checks the sequences and lists those that have queries.
void list_sequences(const PagedSequences& from, std::int64_t rows, const PagedCache& cache,
                    Batch& batch) {
  const std::size_t count = from.lengths.size();
  check_argument(from.query_starts.size() == count + 1, "query_starts has ",
                 from.query_starts.size(), " entries for ", count, " sequences");
  check_argument(from.query_starts.front() == 0 && from.query_starts.back() == rows,
                 "query_starts must go from 0 to ", rows, ", not from ", from.query_starts.front(),
                 " to ", from.query_starts.back());
  batch.clear();
  for (std::size_t s = 0; s < count; ++s) {
    BatchSequence sequence;
    sequence.first_row = from.query_starts[s];
    sequence.num_rows = from.query_starts[s + 1] - sequence.first_row;
    sequence.first_position = from.lengths[s] - sequence.num_rows;
    check_argument(sequence.num_rows >= 0 && sequence.first_position >= 0, "sequence ", s, " has ",
                   sequence.num_rows, " queries and length ", from.lengths[s]);
    if (sequence.num_rows == 0) continue;
    const std::int64_t blocks =
        (std::int64_t{from.lengths[s]} + cache.block_size - 1) / cache.block_size;
    check_argument(from.block_table != nullptr && blocks <= from.table_cols, "sequence ", s,
                   " of length ", from.lengths[s], " needs ", blocks,
                   " blocks, block_table has columns for ", from.table_cols);
    sequence.block_table = from.block_table + static_cast<std::int64_t>(s) * from.table_stride;
    for (std::int64_t i = 0; i < blocks; ++i) {
      const std::int32_t block = sequence.block_table[i];
      check_argument(0 <= block && block < cache.num_blocks, "block_table[", s, ", ", i, "] is ",
                     block, ", the cache has ", cache.num_blocks, " blocks");
    }
    batch.sequences.push_back(sequence);
  }
}

}  // namespace

void OpExecutor::write_kv(const TensorView& k, const TensorView& v,
                          std::span<const std::int64_t> slots, const PagedCache& cache,
                          int threads) {
  check_cache(cache);
  check_threads(threads);
  const std::int64_t cols = std::int64_t{cache.kv_heads} * cache.head_dim;
  const auto rows = static_cast<std::int64_t>(slots.size());
  for (const TensorView* side : {&k, &v}) {
    const char* name = side == &k ? "k" : "v";
    check_matrix(name, *side);
    check_argument(is_activation(side->dtype), name, " must be float32 or bfloat16, not ",
                   dtype_name(side->dtype));
    check_argument(side->rows == rows && side->cols == cols, name, " has shape [", side->rows, ", ",
                   side->cols, "], not [", rows, ", ", cols, "]");
  }
  const std::int64_t places = cache.num_blocks * cache.block_size;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check_argument(-1 <= slots[i] && slots[i] < places, "slots[", i, "] is ", slots[i],
                   ", the cache has ", places, " places");
  }
  if (rows == 0) return;
  const KvLayer layer = layer_of(cache);
  const bool f32 = cache.dtype == DType::kFloat32;
  std::lock_guard lock(impl_->turn);
  auto write_k = f32 ? impl_->kernels.write_k_f32 : impl_->kernels.write_k_bf16;
  auto write_v = f32 ? impl_->kernels.write_v_f32 : impl_->kernels.write_v_bf16;
  threads = worthwhile_threads(rows * cols * 8, threads);
  const Activations floats = impl_->q_floats.take(DType::kFloat32, threads, static_cast<int>(cols));
  impl_->run(threads, [&](ExecutionContext& ctx) {
    float* row = floats.rows_from(ctx.member.id()).f32();
    auto [first, last] = ctx.member.share(static_cast<int>(rows));
    for (int i = first; i < last; ++i) {
      const std::int64_t slot = slots[static_cast<std::size_t>(i)];
      if (slot < 0) continue;
      const auto block = static_cast<std::int32_t>(slot / cache.block_size);
      const auto offset = static_cast<int>(slot % cache.block_size);
      for (const TensorView* side : {&k, &v}) {
        cpu::read_row(*side, i, row);
        for (int head = 0; head < cache.kv_heads; ++head) {
          const float* values = row + std::ptrdiff_t{head} * cache.head_dim;
          if (side == &k) {
            write_k(values, cache.head_dim, 0, cache.head_dim, offset, layer.k.at(block, head));
          } else {
            write_v(values, cache.head_dim, 0, cache.head_dim, offset, layer.v.at(block, head));
          }
        }
      }
    }
  });
}

void OpExecutor::paged_attention(const TensorView& q, const PagedCache& cache,
                                 const PagedSequences& sequences, float scale, int window,
                                 const MutableTensorView& out, int threads) {
  check_cache(cache);
  check_threads(threads);
  check_matrix("q", q);
  check_matrix("out", out);
  check_argument(is_activation(q.dtype) && out.dtype == q.dtype,
                 "q and out must both be float32 or bfloat16, not ", dtype_name(q.dtype), " and ",
                 dtype_name(out.dtype));
  check_argument(out.rows == q.rows && out.cols == q.cols, "out has shape [", out.rows, ", ",
                 out.cols, "], not [", q.rows, ", ", q.cols, "]");
  check_argument(window >= 0, "window must not be negative, got ", window);
  AttentionShape shape;
  shape.heads = static_cast<int>(q.cols / cache.head_dim);
  shape.kv_heads = cache.kv_heads;
  shape.head_dim = cache.head_dim;
  shape.window = window;
  shape.scale = scale;
  check_argument(q.cols % cache.head_dim == 0 && shape.heads % cache.kv_heads == 0 &&
                     shape.group() <= cpu::kMaxAttentionRows,
                 "q has ", q.cols, " columns: heads of ", cache.head_dim, ", a multiple of ",
                 cache.kv_heads, " kv heads and at most ", cpu::kMaxAttentionRows,
                 " times as many, are wanted");
  std::lock_guard lock(impl_->turn);
  list_sequences(sequences, q.rows, cache, impl_->batch);
  if (q.rows == 0) return;
  std::int64_t work = 0;
  for (const BatchSequence& sequence : impl_->batch.sequences) {
    work += 2 * q.cols * sequence.num_rows * (sequence.first_position + sequence.num_rows);
  }
  threads = worthwhile_threads(work, threads);
  AttentionSchedule& schedule = impl_->schedule_of(shape, threads);
  schedule.plan(impl_->batch);
  const int rows = static_cast<int>(q.rows);
  const bool convert = q.dtype != DType::kFloat32;
  const Activations floats =
      convert ? impl_->q_floats.take(DType::kFloat32, rows, static_cast<int>(q.cols))
              : activations_of(q);
  impl_->run(threads, [&](ExecutionContext& ctx) {
    if (convert) {
      auto [first, last] = ctx.member.share(rows);
      for (int i = first; i < last; ++i) cpu::read_row(q, i, floats.rows_from(i).f32());
      ctx.member.barrier();
    }
    schedule.run(ctx, impl_->batch, floats.f32(), floats.ld, layer_of(cache), {},
                 activations_of(out));
  });
}

}  // namespace deinfer

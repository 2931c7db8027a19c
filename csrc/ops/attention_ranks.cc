// Attention over KV whose tokens ranks divide: what a rank contributes, and how it is merged.
#include <algorithm>
#include <limits>

#include "ops/attention.h"
#include "plan/exchanges.h"

namespace deinfer {

int AttentionSchedule::partial_columns() const {
  return attention_part_columns({.num_heads = shape_.heads, .head_dim = shape_.head_dim});
}

/// What this rank found for the rows of a unit, from `row` of the pass on: outputs, unless they are
/// latents, maxima and sums, of all heads each.
void AttentionSchedule::contribute(const Unit& unit, int row, const cpu::AttentionState& state,
                                   const Call& call) {
  for (int i = 0; i < unit.rows(); ++i) {
    const int head = unit.head + i % unit.heads;
    float* out = call.partial + std::ptrdiff_t{row + i / unit.heads} * partial_columns();
    if (!shape_.absorbs_v()) {
      std::copy_n(state.output + std::ptrdiff_t{i} * shape_.head_dim, shape_.head_dim,
                  out + std::ptrdiff_t{head} * shape_.head_dim);
    }
    float* numbers = out + std::ptrdiff_t{shape_.heads} * shape_.head_dim;
    numbers[head] = state.maximum[i];
    numbers[shape_.heads + head] = state.sum[i];
  }
}

/// Outputs that were divided by their sums, as U and the bias of values want them, times these.
/// (Where a rank found nothing that is no number, but merging passes over it.)
void AttentionSchedule::scale_contribution(ExecutionContext& ctx, const Pass& pass,
                                           const Call& call) {
  auto [begin, end] = ctx.member.share(pass.rows.size() * shape_.heads);
  for (int i = begin; i < end; ++i) {
    const int head = i % shape_.heads;
    float* row = call.partial + std::ptrdiff_t{i / shape_.heads} * partial_columns();
    const float* sums = row + std::ptrdiff_t{shape_.heads} * (shape_.head_dim + 1);
    ctx.kernels.scale_row(row + std::ptrdiff_t{head} * shape_.head_dim, shape_.head_dim,
                          sums[head]);
  }
}

/// Exchanges what the ranks found, and merges it for the heads whose outputs are wanted here.
void AttentionSchedule::merge_ranks(ExecutionContext& ctx, const Pass& pass, const Call& call) {
  const int head_dim = shape_.head_dim;
  const Range heads = shape_.out_heads;
  const Ticket ticket =
      ctx.exchange_floats(Collective::kReduceScatter, pass.rows.size(), partial_columns());
  const cpu::AttentionState total = state_at(ctx.scratch.attention.as<float>());
  auto [begin, end] = ctx.member.share(pass.rows.size() * heads.size());
  for (int i = begin; i < end; ++i) {
    const int row = i / heads.size();
    const int head = heads.begin + i % heads.size();
    *total.maximum = -std::numeric_limits<float>::infinity();
    *total.sum = 0.0f;
    for (int rank = 0; rank < ctx.exchange.size(); ++rank) {
      // The kernel reads `from` only.
      auto* part = const_cast<float*>(ctx.floats_from(rank, ticket)) +
                   std::ptrdiff_t{row} * partial_columns();
      float* numbers = part + std::ptrdiff_t{shape_.heads} * head_dim + head;
      ctx.kernels.attention_merge(
          {numbers, numbers + shape_.heads, part + std::ptrdiff_t{head} * head_dim}, 1, head_dim,
          total);
    }
    const Activations out = call.out.rows_from(pass.rows.begin + row)
                                .columns_from(std::ptrdiff_t{head - heads.begin} * head_dim);
    if (out.dtype == DType::kFloat32) {
      ctx.kernels.attention_finish_f32(total, 1, 1, head_dim, out.f32(), out.ld, head_dim);
    } else {
      ctx.kernels.attention_finish_bf16(total, 1, 1, head_dim, out.b16(), out.ld, head_dim);
    }
  }
  ctx.exchange.finish(ctx.member, ticket);
}

}  // namespace deinfer

// How dimensions are divided among ranks.
#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "plan/plans.h"

namespace deinfer {
namespace {

Range scaled(Range range, int factor) { return {range.begin * factor, range.end * factor}; }

}  // namespace

Range split(int n, int parts, int index, int align) {
  const std::int64_t units = (static_cast<std::int64_t>(n) + align - 1) / align;
  auto border = [&](int i) {
    return static_cast<int>(std::min<std::int64_t>(n, units * i / parts * align));
  };
  return {border(index), border(index + 1)};
}

TensorParallelPlan::TensorParallelPlan(const ModelShape& model, int size)
    : model_(model), size_(size) {
  check_argument(size >= 1, "tensor_parallel_size=", size, " must be at least 1");
  check_argument(model.num_kv_heads >= 1 && model.num_heads % model.num_kv_heads == 0,
                 "num_attention_heads=", model.num_heads,
                 " is not a multiple of num_key_value_heads=", model.num_kv_heads);
  check_argument(size <= model.num_heads, "tensor_parallel_size=", size,
                 " exceeds the model's attention heads, ", model.num_heads);
}

Range TensorParallelPlan::hidden_share(int rank) const {
  return split(model_.hidden_size, size_, rank, 16);
}

Range TensorParallelPlan::intermediate_share(int rank) const {
  return split(model_.intermediate_size, size_, rank, 16);
}

Range TensorParallelPlan::vocab_share(int rank) const {
  return split(model_.vocab_size, size_, rank, 32);
}

HeadShare TensorParallelPlan::head_share(int rank) const {
  const int group = model_.num_heads / model_.num_kv_heads;
  if (size_ <= model_.num_kv_heads) {
    Range kv_heads = split(model_.num_kv_heads, size_, rank);
    return {scaled(kv_heads, group), kv_heads};
  }
  // No kv head has more than ceil(size / kv heads) ranks; as size <= kv heads * group, that is at
  // most `group`, so that every rank gets a head.
  int kv_head = 0;
  while (split(size_, model_.num_kv_heads, kv_head).end <= rank) ++kv_head;
  const Range ranks = split(size_, model_.num_kv_heads, kv_head);
  const Range part = split(group, ranks.size(), rank - ranks.begin);
  return {{kv_head * group + part.begin, kv_head * group + part.end}, {kv_head, kv_head + 1}};
}

HeadShare TensorParallelPlan::heads(int rank) const {
  if (divides_heads()) return head_share(rank);
  return {{0, model_.num_heads}, {0, model_.num_kv_heads}};
}

LinearPlacement place_linear(const TensorParallelPlan& plan, LinearRole role,
                             const LinearShape& shape, int rank, bool all_heads) {
  LinearPlacement part = plan.place(role, shape, rank);
  const bool projects =
      role == LinearRole::kQuery || role == LinearRole::kKey || role == LinearRole::kValue;
  if (all_heads && projects) part.u_rows = {0, shape.n};
  return part;
}

HeadShare attention_heads(const TensorParallelPlan& plan, int rank, bool all_heads) {
  if (!all_heads) return plan.heads(rank);
  return {{0, plan.model().num_heads}, {0, plan.model().num_kv_heads}};
}

LinearPlacement place_whole(const LinearShape& shape) {
  LinearPlacement whole;
  if (shape.rank > 0) {
    whole.v_rows = {0, shape.rank};
    whole.v_cols = {0, shape.k};
  }
  whole.u_rows = {0, shape.n};
  whole.u_cols = {0, shape.rank > 0 ? shape.rank : shape.k};
  return whole;
}

LinearPlacement place_head(const TensorParallelPlan& plan, const LinearShape& shape, int rank) {
  LinearPlacement part = place_whole(shape);
  part.u_rows = plan.vocab_share(rank);
  return part;
}

Range output_share(const TensorParallelPlan& plan, LinearRole role, int rank) {
  switch (role) {
    case LinearRole::kQuery: return scaled(plan.head_share(rank).heads, plan.model().head_dim);
    case LinearRole::kKey:
    case LinearRole::kValue: return scaled(plan.head_share(rank).kv_heads, plan.model().head_dim);
    case LinearRole::kGate:
    case LinearRole::kUp: return plan.intermediate_share(rank);
    default: fail(ErrorCode::kInternal, "output_share of role ", static_cast<int>(role));
  }
}

Range input_share(const TensorParallelPlan& plan, LinearRole role, int rank) {
  switch (role) {
    case LinearRole::kAttentionOutput:
      return scaled(plan.head_share(rank).heads, plan.model().head_dim);
    case LinearRole::kDown: return plan.intermediate_share(rank);
    default: fail(ErrorCode::kInternal, "input_share of role ", static_cast<int>(role));
  }
}

}  // namespace deinfer

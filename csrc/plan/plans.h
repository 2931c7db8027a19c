// The plans of registry.cc, and what their placements have in common.
#pragma once

#include <memory>

#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// Whether a linear adds to the residual stream (attention output, down); the others but the head
/// read it.
constexpr bool adds_to_residual(LinearRole role) {
  return role == LinearRole::kAttentionOutput || role == LinearRole::kDown;
}

/// Everything, and no exchange.
LinearPlacement place_whole(const LinearShape& shape);
/// The head under every plan: rows of the vocabulary, V whole.
LinearPlacement place_head(const TensorParallelPlan& plan, const LinearShape& shape, int rank);
/// The outputs of a linear that reads the residual stream which belong to `rank`: those of its
/// heads, kv heads or part of the intermediate dimension.
Range output_share(const TensorParallelPlan& plan, LinearRole role, int rank);
/// The inputs of a linear that adds to the residual stream which `rank` has computed.
Range input_share(const TensorParallelPlan& plan, LinearRole role, int rank);

std::unique_ptr<TensorParallelPlan> make_dense_plan(const ModelShape& model, int size);
std::unique_ptr<TensorParallelPlan> make_naive_plan(const ModelShape& model, int size);
std::unique_ptr<TensorParallelPlan> make_rank_gather_plan(const ModelShape& model, int size);
std::unique_ptr<TensorParallelPlan> make_hidden_sharded_plan(const ModelShape& model, int size);
std::unique_ptr<TensorParallelPlan> make_two_collective_plan(const ModelShape& model, int size);
std::unique_ptr<TensorParallelPlan> make_token_sharded_plan(const ModelShape& model, int size);

}  // namespace deinfer

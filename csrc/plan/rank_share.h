// The plans of one engine, and what they leave to one rank.
#pragma once

#include <array>
#include <memory>
#include <string_view>
#include <vector>

#include "plan/overlap.h"
#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// Plans that place weights alike take turns: one for decode steps, one for prefill.
enum class StepKind { kDecode, kPrefill };
inline constexpr std::size_t kNumStepKinds = 2;

/// One plan per kind of step, indexed by StepKind.
using StepPlans = std::array<std::shared_ptr<const TensorParallelPlan>, kNumStepKinds>;

/// Likewise, in how many chunks their exchanges overlap with computing.
using StepChunks = std::array<ExchangeChunks, kNumStepKinds>;

/// The plan `name` in both kinds of step. Throws as make_plan().
StepPlans make_step_plans(std::string_view name, const ModelShape& model, int size);

struct RankShare {
  /// Throws kInvalidArgument when the plans of `plans` place weights differently.
  RankShare(const StepPlans& plans, int rank);

  StepPlans plans;
  int rank;
  int size;
  HeadShare heads;
  int intermediate;                 // columns of the MLP's inner activations on this rank
  std::vector<Range> vocabularies;  // of every rank
  std::vector<Range> hidden;        // of every rank under hidden shards, else empty
  std::array<ResidualLayout, kNumStepKinds> residual;

  Range vocabulary() const { return vocabularies[static_cast<std::size_t>(rank)]; }
  /// As place_linear().
  LinearPlacement place(StepKind kind, LinearRole role, const LinearShape& shape,
                        bool all_heads = false) const;
  HeadShare attention_heads(bool all_heads) const {
    return deinfer::attention_heads(*plans[0], rank, all_heads);
  }
};

}  // namespace deinfer

// The plans of one engine, and what they leave to one rank.
#pragma once

#include <array>
#include <memory>
#include <string_view>
#include <vector>

#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// Plans that place weights alike take turns: one for decode steps, one for prefill.
enum class Phase { kDecode, kPrefill };
inline constexpr std::size_t kNumPhases = 2;

/// One plan per phase, indexed by Phase.
using PhasePlans = std::array<std::shared_ptr<const TensorParallelPlan>, kNumPhases>;

/// The plan `name` in both phases. Throws as make_plan().
PhasePlans make_phase_plans(std::string_view name, const ModelShape& model, int size);

struct RankShare {
  /// Throws kInvalidArgument when the plans of `plans` place weights differently.
  RankShare(const PhasePlans& plans, int rank);

  PhasePlans plans;
  int rank;
  int size;
  HeadShare heads;
  int intermediate;                 // columns of the MLP's inner activations on this rank
  std::vector<Range> vocabularies;  // of every rank
  std::vector<Range> hidden;        // of every rank under hidden shards, else empty
  std::array<ResidualLayout, kNumPhases> residual;

  Range vocabulary() const { return vocabularies[static_cast<std::size_t>(rank)]; }
  LinearPlacement place(Phase phase, LinearRole role, const LinearShape& shape) const;
};

}  // namespace deinfer

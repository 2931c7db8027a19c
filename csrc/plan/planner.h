// Chooses a tensor-parallel plan by predicted time: weights stay where they are, so that the choice
// is one weight layout, and within it a plan for each phase.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "deinfer/planner.h"
#include "plan/cost_model.h"

namespace deinfer {

/// The most chunks that are predicted.
inline constexpr int kMaxPlannedChunks = 4;

struct PlannerOptions {
  int size = 1;
  LinkModel link;
  Hardware hardware;
  std::uint64_t memory_bytes = 0;  // of a rank; 0: that of the hardware
  std::vector<int> batches;        // decode phases, each at `context`
  std::vector<int> prefill;        // prefill phases, at the beginning of a prompt
  int context = 1024;
  std::map<std::string, double> mix;  // as PlannerConfig::mix
  std::string kv_cache = "dense";     // as KvRequest::cache
  std::string kv_latents = "auto";    // as KvRequest::latents
  int max_chunks = 1;
};

/// The weight layout of a plan: its name, or that of the plan that it shares its layout with.
std::string_view weight_layout(std::string_view plan);

/// Predicts every plan and chooses. Throws kInvalidArgument for a bad option and for more ranks
/// than attention heads.
PlanReport choose_plan(const PlannedModel& model, const PlannerOptions& options);

}  // namespace deinfer

// The planner's reasons in words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "deinfer/planner.h"

namespace deinfer {

/// A layout that fits the memory.
struct RankedLayout {
  std::string name;
  double score = 0;                       // 1: the fastest in every phase of the mix
  std::vector<const PlanEstimate*> best;  // per phase
};

/// Why the first of `layouts`, which are sorted by score, was chosen over the second, and what did
/// not fit. `report` has its choices.
std::string reason_of_choice(const PlanReport& report, const std::vector<RankedLayout>& layouts);

/// `kv_tokens`: what the largest phase of the mix needs.
std::string reason_nothing_fits(const std::vector<PlanEstimate>& plans, std::int64_t kv_tokens,
                                std::uint64_t memory_bytes);

}  // namespace deinfer

// Who gives way when KV blocks run out.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/check.h"
#include "scheduler/scheduling_policy.h"

namespace deinfer {
namespace {

/// Tokens to compute again per block that comes free, in blocks rounded up, so that only sharing
/// makes a difference and not how full the last block is. Blocks that others hold, too, stay.
std::int64_t recompute_cost(const Sequence& sequence, const BlockManager& blocks) {
  const auto shared = std::ranges::partition_point(
      sequence.block_table, [&](std::int32_t block) { return blocks.reference_count(block) > 1; });
  const std::int64_t freed = sequence.block_table.end() - shared;
  if (freed == 0) return std::numeric_limits<std::int64_t>::max();
  const std::int64_t size = blocks.block_size();
  const std::int64_t kept = (shared - sequence.block_table.begin()) * size;
  const std::int64_t lost = std::max<std::int64_t>(0, sequence.num_computed - kept);
  return (lost + freed * size - 1) / (freed * size);
}

}  // namespace

Sequence* cheapest_victim(const SchedulingContext& context) {
  if (context.running.empty()) fail(ErrorCode::kInternal, "no candidates for preemption");
  Sequence* victim = nullptr;
  std::int64_t victim_cost = 0;
  for (Sequence* candidate : context.running) {
    const std::int64_t cost = recompute_cost(*candidate, *context.blocks);
    const auto gives_way = [&] {
      if (victim == nullptr) return true;
      if (candidate->priority != victim->priority) return candidate->priority < victim->priority;
      if (candidate->promoted != victim->promoted) return victim->promoted;
      if (cost != victim_cost) return cost < victim_cost;
      if (candidate->expected_remaining != victim->expected_remaining) {
        return candidate->expected_remaining > victim->expected_remaining;
      }
      return runs_before(*victim, *candidate);
    };
    if (!gives_way()) continue;
    victim = candidate;
    victim_cost = cost;
  }
  return victim;
}

}  // namespace deinfer

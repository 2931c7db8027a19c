// Counters of a running scheduler.
#pragma once

#include <cstdint>

namespace deinfer {

struct SchedulerStats {
  int num_waiting = 0;
  int num_running = 0;  // have a seat
  int num_resting = 0;  // have KV and wait for their turn
  int free_blocks = 0;
  int cached_blocks = 0;  // evictable
  int used_blocks = 0;
  std::int64_t promised_blocks = 0;  // that running sequences still need for their known tokens
  std::int64_t forecast_blocks = 0;  // most that admission expected the running ones to hold, when
                                     // it last admitted one by forecast; 0: none yet
  // Most blocks forecast less most blocks used, in the last whole window of kForecastWindow steps,
  // as a share of the pool: positive where admission held back too much.
  double forecast_error = 0.0;

  std::int64_t num_preemptions = 0;      // all of these:
  std::int64_t evicted_for_decode = 0;   // no block for another one's next token
  std::int64_t evicted_for_prefill = 0;  // no block for another one's prompt
  std::int64_t set_aside = 0;            // by the policy
  std::int64_t paused_steps = 0;         // of sequences that waited for a block with their KV
  std::int64_t num_promotions = 0;
  std::int64_t generated_tokens = 0;
  std::int64_t recomputed_tokens = 0;  // computed again after a preemption
  std::int64_t prefix_hit_tokens = 0;  // never computed for their sequence, taken from the cache

  /// Generated tokens by generated and recomputed ones; 1 before the first.
  double effective_token_ratio() const {
    const auto all = static_cast<double>(generated_tokens + recomputed_tokens);
    return all > 0.0 ? static_cast<double>(generated_tokens) / all : 1.0;
  }

  static constexpr int kForecastWindow = 256;
};

}  // namespace deinfer

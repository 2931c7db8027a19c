// One sample of a request, as the scheduler sees it.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "deinfer/sampling_params.h"
#include "scheduler/length_distribution.h"

namespace deinfer {

using SequenceId = std::uint64_t;

enum class SequenceState : std::uint8_t { kWaiting, kRunning, kFinished };

/// A request with n samples makes n sequences with the same tokens. Filled by the engine up to the
/// line, kept by the Scheduler below it.
struct Sequence {
  SequenceId id = 0;
  std::uint64_t arrival = 0;           // order of submission; sequences of one request may share it
  std::int64_t arrival_us = 0;         // same clock as Scheduler::schedule(now_us)
  int priority = 0;                    // higher runs earlier
  std::vector<TokenId> tokens;         // prompt, then generated ones
  int prompt_length = 0;               // tokens
  int max_new_tokens = 0;              // generated at most
  LengthDistribution expected_length;  // generated tokens; advisory
  bool hinted = false;       // expected_length is the caller's own: no prediction replaces it
  bool reuse_prefix = true;  // may take computed blocks (false: needs every position's logits)

  // ---- kept by the scheduler ----
  SequenceState state = SequenceState::kWaiting;
  int num_computed = 0;                   // tokens whose KV is in the cache
  std::vector<std::int32_t> block_table;  // block i holds the tokens [i, i + 1) * block_size
  int preemptions = 0;                    // times that its KV was dropped
  int evictions = 0;                      // those of them that were for lack of blocks
  int pause = 0;                          // steps that it has been waiting for a block
  bool resting = false;                   // runs, but others have the seats in this step
  int max_computed = 0;                   // highest num_computed before a preemption
  int num_registered = 0;                 // leading blocks that are known to the prefix cache
  bool computed_twice = false;            // holds blocks that the prefix cache has elsewhere, too
  std::uint64_t prefix_node = 0;          // the prefix cache's name for those blocks' content
  bool promoted = false;  // waited too long: goes before others of its priority, by arrival
  std::int64_t promotion_us = kNeverPromoted;  // when that happens
  float expected_remaining = 0.0f;  // tokens, when it began to wait or is up for preemption;
                                    // 0: unknown
  float turn = 0.0f;            // SchedulingPolicy::turn() when it had turn_tokens generated tokens
  int turn_tokens = -1;         // -1: to be asked again
  float admission_mean = 0.0f;  // total length as believed when it was first admitted; 0: unknown
  float admission_q90 = 0.0f;   // its 90 % quantile

  static constexpr std::int64_t kNeverPromoted = std::numeric_limits<std::int64_t>::max();

  int length() const { return static_cast<int>(tokens.size()); }
  int num_generated() const { return length() - prompt_length; }
  /// Tokens that have to be computed before the next one can be sampled.
  int num_pending() const { return length() - num_computed; }
};

}  // namespace deinfer

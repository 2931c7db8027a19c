// Sequences and steps for tests of the scheduler.
#pragma once

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "scheduler/scheduler.h"

namespace deinfer::test {

inline SchedulerConfig small_config() {
  SchedulerConfig config;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 64;
  config.block_size = 4;
  config.num_blocks = 64;
  config.watermark = 0.0;
  return config;
}

/// Prompts differ in every token between first_token values that are far apart.
inline Sequence make_sequence(SequenceId id, int prompt_length, int max_new_tokens,
                              TokenId first_token = 0) {
  Sequence sequence;
  sequence.id = id;
  sequence.arrival = id;
  sequence.tokens.resize(static_cast<std::size_t>(prompt_length));
  std::iota(sequence.tokens.begin(), sequence.tokens.end(), first_token);
  sequence.prompt_length = prompt_length;
  sequence.max_new_tokens = max_new_tokens;
  return sequence;
}

inline Sequence distinct(SequenceId id, int prompt_length, int max_new_tokens) {
  return make_sequence(id, prompt_length, max_new_tokens, static_cast<TokenId>(id) * 10'000);
}

/// Runs one step in which every sampled sequence gets token 7 and ends at its max_new_tokens.
inline void answer(Scheduler& scheduler, const ScheduledBatch& batch) {
  std::vector<SampledToken> sampled;
  for (const ScheduledSequence& item : batch.items) {
    if (!item.samples) continue;
    const Sequence& s = *item.sequence;
    sampled.push_back({s.id, 7, s.num_generated() + 1 == s.max_new_tokens});
  }
  scheduler.update(sampled);
}

inline std::vector<SequenceId> ids(const ScheduledBatch& batch) {
  std::vector<SequenceId> result;
  for (const ScheduledSequence& item : batch.items) result.push_back(item.sequence->id);
  return result;
}

inline int tokens_of(const ScheduledBatch& batch, SequenceId id) {
  for (const ScheduledSequence& item : batch.items) {
    if (item.sequence->id == id) return item.num_tokens;
  }
  return 0;
}

/// The error that fn throws, as "code: message"; empty when it throws none.
template <typename Fn>
std::string error_of(Fn&& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return std::to_string(static_cast<int>(e.code())) + ": " + e.what();
  }
  return {};
}

inline std::string prefix(ErrorCode code) { return std::to_string(static_cast<int>(code)) + ": "; }

using Ids = std::vector<SequenceId>;

}  // namespace deinfer::test

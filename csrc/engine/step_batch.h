// The rows of a step: the batch that is computed, and where what is sampled of it goes.
#pragma once

#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/thread_team.h"
#include "engine/hidden_states.h"
#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/worker.h"
#include "ops/batch.h"
#include "ops/sampling.h"
#include "scheduler/scheduler.h"

namespace deinfer {

/// Request and number of the sample that a sequence is.
using SequenceOwners = std::unordered_map<SequenceId, std::pair<Request*, int>>;

/// Rows are sampled in one of three ways: the worker finds the most likely token, or samples (as
/// its SamplingRoom allows), or the samplers here do so from its logits.
class StepBatch {
 public:
  /// `samplers`: one per thread of the worker.
  StepBatch(int block_size, int vocab_size, std::vector<Sampler> samplers)
      : block_size_(block_size), vocab_size_(vocab_size), samplers_(std::move(samplers)) {}

  /// Lays out what was scheduled. Owners and sequences must stay until all was taken.
  void build(const ScheduledBatch& scheduled, const SequenceOwners& owners,
             const HiddenStates& hidden_states, SamplingRoom room);
  const Batch& batch() const { return batch_; }

  /// Take what the worker has found; take_logits() is its LogitsConsumer.
  void take_logits(TeamMember& member, int first, int count, float* logits);
  void take_sampled(std::span<SampleResult> rows);
  void take_most_likely(std::span<const TokenId> tokens);

  /// Of the i-th sequence that samples, in the order scheduled.
  SampleResult& result(std::size_t i) { return results_[i]; }

 private:
  /// What a row is for.
  struct Target {
    Request* request = nullptr;
    const Sequence* sequence = nullptr;
    int index = 0;
    int prompt_position = -1;  // -1: sample the next token
    int result = -1;           // index of its SampleResult
  };

  int block_size_;
  int vocab_size_;
  std::vector<Sampler> samplers_;
  Batch batch_;
  std::vector<Target> targets_;          // per logit row
  std::vector<Target> sampled_targets_;  // per row that the worker samples
  std::vector<SampleResult> results_;    // per sampled row
  std::vector<int> argmax_results_;      // per argmax row, index of its SampleResult
};

}  // namespace deinfer

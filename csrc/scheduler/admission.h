// Which waiting sequence has room to start, by the expected lengths of all that run.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "scheduler/block_manager.h"
#include "scheduler/kv_forecast.h"
#include "scheduler/length_history.h"
#include "scheduler/scheduler_config.h"

namespace deinfer {

/// Keeps what earlier answers say about lengths and decides how much room a sequence must find.
///
/// An expected length comes from the sequence's own distribution where it is known, else from the
/// history. Each sequence stands for a fixed part of its distribution (LengthHistory::stratum), so
/// that many together end as differently as real ones do; with everyone's mean they would all be
/// expected to hold their KV at once. Whoever outlives its expectation gets the history's
/// conditional mean, and at least two blocks. While nothing is known about a sequence, nor enough
/// answers have ended, it is admitted if its known tokens fit.
class AdmissionController {
 public:
  /// Both must outlive it.
  AdmissionController(const SchedulerConfig& config, const BlockManager& blocks);

  /// A sequence ended, or was cut off, with so many tokens.
  void observe(const Sequence& sequence, bool ended) {
    history_.add(sequence.num_generated(), ended);
  }
  const LengthHistory& history() const { return history_; }

  /// E[remaining tokens], of the sequence itself, conditional on what it has generated; 0 when
  /// nothing is known about it. What policies order by.
  float expected_remaining(const Sequence& sequence) const;
  /// Remaining tokens that admission reckons with, in [1, max_new_tokens - generated]; 0 when
  /// neither the sequence nor the history says anything.
  int remaining(const Sequence& sequence) const;

  /// Evicted so often that it must not happen again.
  bool pinned(const Sequence& sequence) const {
    return config_.preempt_limit > 0 && sequence.evictions >= config_.preempt_limit;
  }

  /// Keeps in the sequence what is believed about its length now that it starts.
  void note_belief(Sequence& sequence) const;

  /// Begins a step's admissions.
  void begin(std::span<Sequence* const> running);
  /// Whether the running sequences leave the candidate room enough. `match`: its cached prefix.
  bool has_room(const Sequence& candidate, const BlockManager::PrefixMatch& match);
  /// Whether the pool holds the candidate's and all running sequences' whole answers at once, so
  /// that it does not matter who rests. Where nothing is expected, answers reach their limits.
  bool whole_answers_fit(const Sequence& candidate);
  /// The candidate was admitted and is the last of `running` now.
  void admitted(std::span<Sequence* const> running);

  /// Blocks that the running sequences will hold at most, as last forecast; 0: none was needed.
  std::int64_t forecast_blocks() const { return forecast_blocks_; }

 private:
  bool peak_fits(const Sequence& candidate, const BlockManager::PrefixMatch& match);
  bool reservations_fit(const Sequence& candidate) const;
  bool pinned_fit(const Sequence& candidate) const;
  std::int64_t most_blocks(const Sequence& sequence) const {
    return blocks_.blocks_for(std::int64_t{sequence.prompt_length} + sequence.max_new_tokens);
  }
  std::int64_t whole_blocks(const Sequence& sequence) const;
  int at_least_two_blocks(float tokens) const;
  int shared_blocks(const Sequence& sequence) const;
  /// `pending`: prompt tokens to be computed until its first token, others' included.
  KvForecast::Item item(const Sequence& sequence, std::int64_t pending, int shared) const;
  void forecast_running();
  /// Lets the forecast see those blocks as shared that the match would take from a single holder;
  /// the result is how many matched blocks anyone holds.
  int lend_prefix(const BlockManager::PrefixMatch& match);
  bool graph_pads_a_seat() const;

  const SchedulerConfig& config_;
  const BlockManager& blocks_;
  LengthHistory history_;

  // The step's admissions.
  std::span<Sequence* const> running_;
  std::int64_t pending_ = 0;        // prompt tokens that running sequences have not computed
  std::int64_t whole_blocks_ = -1;  // of all running ones; negative: not counted yet
  bool forecast_done_ = false;
  KvForecast forecast_;
  KvForecast::Item candidate_;                    // that has_room() looked at last
  std::vector<std::pair<SequenceId, int>> lent_;  // blocks by holder
  std::int64_t forecast_blocks_ = 0;
};

}  // namespace deinfer

// Continuous batching over paged KV blocks with chunked prefill and preemption by recompute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler/accuracy_window.h"
#include "scheduler/admission.h"
#include "scheduler/block_manager.h"
#include "scheduler/scheduler_config.h"
#include "scheduler/scheduler_stats.h"
#include "scheduler/scheduling_policy.h"
#include "scheduler/sequence.h"

namespace deinfer {

/// One sequence's part of a step: its tokens [num_computed, num_computed + num_tokens).
struct ScheduledSequence {
  const Sequence* sequence = nullptr;
  int num_tokens = 0;
  bool samples = false;  // reaches the sequence's last token, so a new one is sampled
};

/// Every sequence's block table covers its part. A block may be shared with another sequence of the
/// same batch that computes it in this step: the KV of all tokens of a layer must be written before
/// its attention reads any.
struct ScheduledBatch {
  std::vector<ScheduledSequence> items;  // single tokens first, then prefill chunks
  // Lost their KV in this step and wait again. One that the policy set aside may still be in items:
  // it came back at once because nothing else could run.
  std::vector<SequenceId> preempted;
  int num_tokens = 0;
  int graph_size = 0;  // the least of the config's graph_sizes that holds all items; 0: none does
};

/// The engine's answer for one item with `samples`.
struct SampledToken {
  SequenceId id = 0;
  TokenId token = 0;
  bool finished = false;  // this token ends the sequence
};

class EventLog;

/// Decides what each step computes. Deterministic: the same calls give the same batches. One
/// thread; no clock, no random numbers, no device.
///
/// A step serves the running sequences first: single tokens (decodes), then prefill chunks in order
/// of admission with what is left of the token budget; then it admits waiting ones. Since admission
/// spends only what all the running ones left over, these are never more than the budget has
/// tokens, and so neither decodes nor prefills starve. When blocks run out a running sequence is
/// preempted: it keeps its tokens, loses its KV and waits with its old arrival. (A policy may
/// have what it sets aside start again from the prompt; its tokens are then sampled a second time,
/// and the caller must see to it that they are the same and are reported once.) The running
/// sequence that comes first by priority, promotion and arrival is never preempted for another, so
/// that one always gets done. Nor is one that was evicted `preempt_limit` times before: it comes
/// back when it can never again lack a block.
///
/// Where a policy takes turns, more sequences than max_num_seqs may hold KV, if there is room for
/// all that they will ever need; those without a seat rest. The one that comes first never does.
class Scheduler {
 public:
  /// Throws Error(kInvalidArgument) for a bad configuration.
  Scheduler(const SchedulerConfig& config, std::unique_ptr<SchedulingPolicy> policy);

  /// Takes a new sequence (fields above the line in Sequence). Throws Error(kInvalidArgument) for
  /// an empty prompt, inconsistent lengths or a known id, and Error(kOutOfMemory) when prompt +
  /// max_new_tokens exceed the whole pool, so that it could never end.
  void add(Sequence sequence);
  /// Ends a sequence now; false if unknown or already ended. Not between schedule() and update().
  bool abort(SequenceId id);
  /// Replaces what is believed about an unfinished sequence's length, unless its caller gave a
  /// hint; false if it is unknown or ended. Not between schedule() and update().
  bool expect(SequenceId id, const LengthDistribution& length);
  bool has_unfinished() const { return !sequences_.empty(); }

  /// Plans the next step. The result, and the sequences that it points to (ended ones included),
  /// are valid until the next schedule(). Unless it is empty, update() must follow. It is empty
  /// only when nothing is unfinished.
  const ScheduledBatch& schedule(std::int64_t now_us);
  /// Records the step as done; `sampled` answers the items with `samples`, in their order. Throws
  /// Error(kInternal) if it does not, or if a sequence passes its max_new_tokens unfinished.
  void update(std::span<const SampledToken> sampled);

  SchedulerStats stats() const;
  /// The lengths of ended sequences against what was believed when they were admitted.
  const AccuracyWindow& accuracy() const { return accuracy_; }
  /// Writes all further calls to the log, which must live as long as they go on; null ends that.
  void record(EventLog* log) { log_ = log; }
  /// A waiting or running sequence, or null.
  const Sequence* find(SequenceId id) const;
  const SchedulerConfig& config() const { return config_; }
  /// Throws Error(kInternal) when the block accounting is inconsistent. For tests: O(pool).
  void check_invariants() const;

 private:
  void enqueue(Sequence& sequence);
  void dequeue(Sequence& sequence);
  void promote_waiting();
  void choose_seats();
  int seats_to_leave(const Sequence* first);
  float turn_of(Sequence& sequence) const;
  bool sits_before(Sequence& a, Sequence& b, const Sequence* first) const;
  void promote_running();
  void plan_running(Sequence& sequence);
  void plan_item(Sequence& sequence, int num_tokens);
  void plan_waiting();
  bool try_admit(Sequence& sequence);
  int chunk_size(const Sequence& sequence) const;
  int graph_size() const;
  std::int64_t missing_blocks(const Sequence& sequence) const;
  std::int64_t admission_reserve(const Sequence& sequence) const;
  const Sequence* protected_sequence() const;
  bool may_pause(Sequence& sequence);
  Sequence& choose_victim();
  void preempt(Sequence& sequence, bool restart = false);
  void retire(Sequence& sequence, bool ended);
  void compare_forecast();
  SchedulingContext context(std::span<Sequence* const> running) const;

  const SchedulerConfig config_;
  const std::int64_t watermark_blocks_;
  std::unique_ptr<SchedulingPolicy> policy_;
  BlockManager blocks_;
  AdmissionController admission_;
  std::unordered_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> running_;                            // in order of admission
  std::vector<std::unique_ptr<Sequence>> retired_;            // ended since the last schedule()
  std::set<std::pair<std::int64_t, SequenceId>> promotions_;  // when waiting ones will be due
  SchedulerStats totals_;
  AccuracyWindow accuracy_;
  EventLog* log_ = nullptr;

  // The step being planned; buffers are reused.
  ScheduledBatch batch_;
  bool in_flight_ = false;
  bool any_paused_ = false;
  bool blocks_ran_out_ = false;  // in the step before
  int free_seats_ = 0;           // that waiting ones may take
  std::int64_t now_us_ = 0;
  int budget_ = 0;                     // tokens left
  std::int64_t pledged_blocks_ = 0;    // that running sequences still need for their known tokens
  std::vector<Sequence*> order_;       // the running sequences with a seat when the step began
  std::vector<Sequence*> ranking_;     // running sequences, for choosing seats
  std::vector<Sequence*> candidates_;  // for preemption
  BlockManager::PrefixMatch match_;

  // The window of forecasts and what came of them.
  int window_steps_ = 0;
  std::int64_t window_forecast_ = 0;
  std::int64_t window_used_ = 0;
};

}  // namespace deinfer

#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"

namespace deinfer {
namespace {

/// A preempted sequence comes back only when the running ones and itself could then generate so
/// many tokens each: without it they would take turns at preempting each other.
constexpr std::int64_t kReadmissionSteps = 8;

/// Batches show sequences read-only to the engine; the scheduler owns them.
Sequence& owned(const ScheduledSequence& item) { return const_cast<Sequence&>(*item.sequence); }

const SchedulerConfig& validated(const SchedulerConfig& config) {
  config.validate();
  return config;
}

}  // namespace

void SchedulerConfig::validate() const {
  const auto at_least = [](const char* name, int value, int minimum) {
    check_argument(value >= minimum, name, " must be at least ", minimum, ", got ", value);
  };
  at_least("max_num_seqs", max_num_seqs, 1);
  at_least("max_num_batched_tokens", max_num_batched_tokens, 1);
  at_least("block_size", block_size, 1);
  at_least("num_blocks", num_blocks, 1);
  at_least("max_prefill_chunk", max_prefill_chunk, 0);
  check_argument(watermark >= 0.0 && watermark < 1.0, "watermark must be in [0, 1), got ",
                 watermark);
}

Scheduler::Scheduler(const SchedulerConfig& config, std::unique_ptr<SchedulingPolicy> policy)
    : config_(validated(config)),
      watermark_blocks_(static_cast<std::int64_t>(std::ceil(config.watermark * config.num_blocks))),
      policy_(std::move(policy)),
      blocks_(config.num_blocks, config.block_size, config.enable_prefix_caching) {
  check_argument(policy_ != nullptr, "scheduler: no policy");
}

void Scheduler::add(Sequence sequence) {
  const SequenceId id = sequence.id;
  check_argument(!sequence.tokens.empty(), "sequence ", id, ": the prompt is empty");
  check_argument(sequence.prompt_length >= 1 && sequence.prompt_length <= sequence.length(),
                 "sequence ", id, ": prompt_length ", sequence.prompt_length, " of ",
                 sequence.length(), " tokens");
  check_argument(sequence.max_new_tokens > sequence.num_generated(), "sequence ", id,
                 ": max_new_tokens ", sequence.max_new_tokens, " with ", sequence.num_generated(),
                 " tokens generated");
  check_argument(!sequences_.contains(id), "sequence ", id, " is known already");
  const std::int64_t tokens = std::int64_t{sequence.prompt_length} + sequence.max_new_tokens;
  if (blocks_.blocks_for(tokens) > config_.num_blocks) {
    fail(ErrorCode::kOutOfMemory, "sequence ", id, ": ", sequence.prompt_length,
         " prompt tokens + ", sequence.max_new_tokens, " new ones take ",
         blocks_.blocks_for(tokens), " KV blocks of ", config_.block_size, " tokens, the pool has ",
         config_.num_blocks);
  }
  sequence.state = SequenceState::kWaiting;
  sequence.num_computed = 0;
  sequence.block_table.clear();
  sequence.preemptions = 0;
  sequence.max_computed = 0;
  sequence.num_registered = 0;
  sequence.prefix_node = 0;
  const auto [entry, inserted] =
      sequences_.emplace(id, std::make_unique<Sequence>(std::move(sequence)));
  policy_->push(*entry->second);
}

bool Scheduler::abort(SequenceId id) {
  if (in_flight_) fail(ErrorCode::kInternal, "abort of sequence ", id, " during a step");
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return false;
  Sequence& sequence = *entry->second;
  if (sequence.state == SequenceState::kWaiting) {
    policy_->remove(sequence);
  } else {
    std::erase(running_, &sequence);
  }
  retire(sequence);
  return true;
}

bool Scheduler::expect(SequenceId id, const LengthDistribution& length) {
  if (in_flight_) fail(ErrorCode::kInternal, "expect() for sequence ", id, " during a step");
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return false;
  Sequence& sequence = *entry->second;
  const bool waiting = sequence.state == SequenceState::kWaiting;
  if (waiting) policy_->remove(sequence);
  sequence.expected_length = length;
  if (waiting) policy_->push(sequence);
  return true;
}

const ScheduledBatch& Scheduler::schedule(std::int64_t now_us) {
  if (in_flight_) fail(ErrorCode::kInternal, "schedule() before the update() of the last step");
  retired_.clear();
  batch_.items.clear();
  batch_.preempted.clear();
  batch_.num_tokens = 0;
  now_us_ = now_us;
  budget_ = config_.max_num_batched_tokens;
  while (Sequence* sequence = policy_->set_aside(context(running_))) {
    if (sequence->state != SequenceState::kRunning) {
      fail(ErrorCode::kInternal, "the scheduling policy set aside sequence ", sequence->id,
           ", which does not run");
    }
    preempt(*sequence, policy_->set_aside_restarts());
  }

  order_ = running_;
  for (Sequence* sequence : order_) {
    if (sequence->num_pending() == 1) plan_running(*sequence);
  }
  for (Sequence* sequence : order_) {
    if (sequence->num_pending() > 1) plan_running(*sequence);
  }
  // Only now: until here a planned sequence could still be preempted, and nobody may share blocks
  // that will not be computed. Admission preempts nobody.
  for (const ScheduledSequence& item : batch_.items) {
    Sequence& sequence = owned(item);
    blocks_.register_computed(sequence, sequence.num_computed + item.num_tokens);
  }
  if (batch_.preempted.empty() || running_.empty()) plan_waiting();
  in_flight_ = !batch_.items.empty();
  if (!in_flight_ && !sequences_.empty()) {
    fail(ErrorCode::kInternal, "the scheduling policy holds back all ", sequences_.size(),
         " sequences");
  }
  return batch_;
}

int Scheduler::chunk_size(const Sequence& sequence) const {
  const int limit = config_.max_prefill_chunk > 0 ? config_.max_prefill_chunk : budget_;
  return std::min({sequence.num_pending(), budget_, limit});
}

void Scheduler::plan_running(Sequence& sequence) {
  if (sequence.state != SequenceState::kRunning) return;  // preempted in this step
  int num_tokens = chunk_size(sequence);
  if (num_tokens == 0) return;
  // A chunk makes do with the blocks that there are; preempting others is for those that could not
  // move at all.
  const std::int64_t fitting = blocks_.capacity(sequence) - sequence.num_computed;
  num_tokens = static_cast<int>(std::clamp<std::int64_t>(fitting, 1, num_tokens));
  while (!blocks_.grow(sequence, sequence.num_computed + num_tokens)) {
    Sequence& victim = choose_victim();
    preempt(victim);
    if (&victim == &sequence) return;
  }
  plan_item(sequence, num_tokens);
}

void Scheduler::plan_item(Sequence& sequence, int num_tokens) {
  batch_.items.push_back({&sequence, num_tokens, num_tokens == sequence.num_pending()});
  batch_.num_tokens += num_tokens;
  budget_ -= num_tokens;
}

Sequence& Scheduler::choose_victim() {
  const auto first = std::ranges::min_element(
      running_, [](const Sequence* a, const Sequence* b) { return runs_before(*a, *b); });
  candidates_.clear();
  for (Sequence* sequence : running_) {
    if (sequence != *first) candidates_.push_back(sequence);
  }
  if (candidates_.empty()) {
    fail(ErrorCode::kInternal, "no KV block for sequence ", (*first)->id, " running alone");
  }
  Sequence* victim = policy_->victim(context(candidates_));
  if (std::ranges::find(candidates_, victim) == candidates_.end()) {
    fail(ErrorCode::kInternal, "the scheduling policy chose a victim that is no candidate");
  }
  return *victim;
}

void Scheduler::preempt(Sequence& sequence, bool restart) {
  const auto item = std::ranges::find(batch_.items, &sequence, &ScheduledSequence::sequence);
  if (item != batch_.items.end()) {
    budget_ += item->num_tokens;
    batch_.num_tokens -= item->num_tokens;
    batch_.items.erase(item);
  }
  sequence.max_computed = std::max(sequence.max_computed, sequence.num_computed);
  blocks_.release(sequence);
  if (restart) sequence.tokens.resize(static_cast<std::size_t>(sequence.prompt_length));
  ++sequence.preemptions;
  ++totals_.num_preemptions;
  sequence.state = SequenceState::kWaiting;
  std::erase(running_, &sequence);
  policy_->push(sequence);
  batch_.preempted.push_back(sequence.id);
}

void Scheduler::plan_waiting() {
  pledged_blocks_ = 0;
  for (const Sequence* sequence : running_) pledged_blocks_ += missing_blocks(*sequence);
  while (budget_ > 0 && static_cast<int>(running_.size()) < config_.max_num_seqs) {
    Sequence* sequence = policy_->next(context(running_));
    if (sequence == nullptr || !try_admit(*sequence)) return;
  }
}

std::int64_t Scheduler::missing_blocks(const Sequence& sequence) const {
  return blocks_.blocks_for(sequence.length()) -
         static_cast<std::int64_t>(sequence.block_table.size());
}

std::int64_t Scheduler::admission_reserve(const Sequence& sequence) const {
  if (running_.empty()) return 0;  // alone, every sequence that was accepted fits
  if (sequence.preemptions == 0) return watermark_blocks_;
  const auto sharers = static_cast<std::int64_t>(running_.size()) + 1;
  return watermark_blocks_ + blocks_.blocks_for(kReadmissionSteps * sharers);
}

bool Scheduler::try_admit(Sequence& sequence) {
  // Blocks for all of its known tokens must be left, not only for the first chunk: prompts that are
  // half computed would preempt each other.
  const std::int64_t spare =
      blocks_.num_available() - pledged_blocks_ - admission_reserve(sequence);
  if (spare < 1) return false;  // before the costlier look at the cache
  blocks_.match_prefix(sequence, match_);
  const std::int64_t needed = blocks_.blocks_for(sequence.length()) -
                              static_cast<std::int64_t>(match_.blocks.size()) + match_.num_cached;
  if (needed > spare) return false;

  policy_->remove(sequence);
  sequence.state = SequenceState::kRunning;
  running_.push_back(&sequence);
  blocks_.take_prefix(sequence, match_);
  totals_.prefix_hit_tokens += std::max(0, sequence.num_computed - sequence.max_computed);
  const int num_tokens = chunk_size(sequence);
  if (!blocks_.grow(sequence, sequence.num_computed + num_tokens)) {
    fail(ErrorCode::kInternal, "no KV blocks for sequence ", sequence.id, " after the check");
  }
  plan_item(sequence, num_tokens);
  pledged_blocks_ += missing_blocks(sequence);
  // At once, so that the other samples of the same prompt share its blocks in this very step.
  blocks_.register_computed(sequence, sequence.num_computed + num_tokens);
  return true;
}

void Scheduler::update(std::span<const SampledToken> sampled) {
  if (!in_flight_) fail(ErrorCode::kInternal, "update() without a step");
  const auto samples = std::ranges::count_if(batch_.items, &ScheduledSequence::samples);
  if (static_cast<std::size_t>(samples) != sampled.size()) {
    fail(ErrorCode::kInternal, "the step samples ", samples, " tokens, got ", sampled.size());
  }
  in_flight_ = false;
  std::size_t next = 0;
  bool any_finished = false;
  for (const ScheduledSequence& item : batch_.items) {
    Sequence& sequence = owned(item);
    const int end = sequence.num_computed + item.num_tokens;
    totals_.recomputed_tokens +=
        std::max(0, std::min(end, sequence.max_computed) - sequence.num_computed);
    sequence.num_computed = end;
    if (!item.samples) continue;
    const SampledToken& answer = sampled[next++];
    if (answer.id != sequence.id) {
      fail(ErrorCode::kInternal, "a token for sequence ", answer.id, " in place of ", sequence.id);
    }
    sequence.tokens.push_back(answer.token);
    if (answer.finished) {
      retire(sequence);
      any_finished = true;
    } else if (sequence.num_generated() >= sequence.max_new_tokens) {
      fail(ErrorCode::kInternal, "sequence ", sequence.id, " goes on after its max_new_tokens ",
           sequence.max_new_tokens);
    }
  }
  if (any_finished) {
    std::erase_if(running_, [](const Sequence* s) { return s->state == SequenceState::kFinished; });
  }
}

void Scheduler::retire(Sequence& sequence) {
  blocks_.release(sequence);
  sequence.state = SequenceState::kFinished;
  const auto entry = sequences_.find(sequence.id);
  retired_.push_back(std::move(entry->second));
  sequences_.erase(entry);
}

SchedulingContext Scheduler::context(std::span<Sequence* const> running) const {
  return {now_us_, running, config_.max_num_seqs, blocks_.num_available()};
}

const Sequence* Scheduler::find(SequenceId id) const {
  const auto entry = sequences_.find(id);
  return entry == sequences_.end() ? nullptr : entry->second.get();
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = totals_;
  stats.num_waiting = static_cast<int>(policy_->size());
  stats.num_running = static_cast<int>(running_.size());
  stats.free_blocks = blocks_.num_free();
  stats.cached_blocks = blocks_.num_cached();
  stats.used_blocks = blocks_.num_used();
  return stats;
}

void Scheduler::check_invariants() const {
  blocks_.check_invariants(std::vector<const Sequence*>(running_.begin(), running_.end()));
  if (running_.size() + policy_->size() != sequences_.size()) {
    fail(ErrorCode::kInternal, running_.size(), " running + ", policy_->size(), " waiting of ",
         sequences_.size(), " sequences");
  }
}

}  // namespace deinfer

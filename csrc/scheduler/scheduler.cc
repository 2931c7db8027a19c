#include "scheduler/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "scheduler/event_log.h"

namespace deinfer {
namespace {

/// Batches show sequences read-only to the engine; the scheduler owns them.
Sequence& owned(const ScheduledSequence& item) { return const_cast<Sequence&>(*item.sequence); }

const SchedulerConfig& validated(const SchedulerConfig& config) {
  config.validate();
  return config;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config, std::unique_ptr<SchedulingPolicy> policy)
    : config_(validated(config)),
      watermark_blocks_(static_cast<std::int64_t>(std::ceil(config.watermark * config.num_blocks))),
      policy_(std::move(policy)),
      blocks_(config.num_blocks, config.block_size, config.enable_prefix_caching),
      admission_(config_, blocks_) {
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
  if (log_ != nullptr) log_->add(sequence);
  sequence.state = SequenceState::kWaiting;
  sequence.num_computed = 0;
  sequence.block_table.clear();
  sequence.preemptions = 0;
  sequence.evictions = 0;
  sequence.pause = 0;
  sequence.resting = false;
  sequence.turn_tokens = -1;
  sequence.max_computed = 0;
  sequence.num_registered = 0;
  sequence.computed_twice = false;
  sequence.prefix_node = 0;
  sequence.promoted = false;
  sequence.promotion_us = Sequence::kNeverPromoted;
  sequence.admission_mean = 0.0f;
  sequence.admission_q90 = 0.0f;
  const auto [entry, inserted] =
      sequences_.emplace(id, std::make_unique<Sequence>(std::move(sequence)));
  enqueue(*entry->second);
}

void Scheduler::enqueue(Sequence& sequence) {
  sequence.state = SequenceState::kWaiting;
  sequence.expected_remaining = admission_.expected_remaining(sequence);
  policy_->push(sequence);
  if (sequence.promoted) return;
  constexpr double kNever = std::numeric_limits<double>::infinity();
  double wait_s = config_.promotion.after_s > 0.0 ? config_.promotion.after_s : kNever;
  const float length =
      sequence.expected_remaining > 0.0f
          ? sequence.expected_remaining + static_cast<float>(sequence.num_generated())
          : admission_.history().mean();
  if (config_.promotion.per_token_s > 0.0 && length > 0.0f) {
    wait_s = std::min(wait_s, config_.promotion.per_token_s * length);
  }
  constexpr double kCentury = 3.2e9;  // in seconds; beyond it, numbers would overflow
  if (wait_s > kCentury) return;
  sequence.promotion_us = sequence.arrival_us + static_cast<std::int64_t>(wait_s * 1e6);
  promotions_.insert({sequence.promotion_us, sequence.id});
}

void Scheduler::dequeue(Sequence& sequence) {
  policy_->remove(sequence);
  promotions_.erase({sequence.promotion_us, sequence.id});
}

void Scheduler::promote_waiting() {
  while (!promotions_.empty() && promotions_.begin()->first <= now_us_) {
    Sequence& sequence = *sequences_.at(promotions_.begin()->second);
    dequeue(sequence);
    sequence.promoted = true;
    ++totals_.num_promotions;
    enqueue(sequence);
  }
}

bool Scheduler::abort(SequenceId id) {
  if (in_flight_) fail(ErrorCode::kInternal, "abort of sequence ", id, " during a step");
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return false;
  if (log_ != nullptr) log_->add(EventLog::Abort{id});
  Sequence& sequence = *entry->second;
  if (sequence.state == SequenceState::kWaiting) {
    dequeue(sequence);
  } else {
    std::erase(running_, &sequence);
  }
  retire(sequence, false);
  return true;
}

bool Scheduler::expect(SequenceId id, const LengthDistribution& length) {
  if (in_flight_) fail(ErrorCode::kInternal, "expect() for sequence ", id, " during a step");
  const auto entry = sequences_.find(id);
  if (entry == sequences_.end()) return false;
  if (log_ != nullptr) log_->add(EventLog::Expect{id, length});
  Sequence& sequence = *entry->second;
  if (sequence.hinted) return true;
  const bool waiting = sequence.state == SequenceState::kWaiting;
  if (waiting) dequeue(sequence);
  sequence.expected_length = length;
  sequence.turn_tokens = -1;
  if (waiting) enqueue(sequence);
  return true;
}

const ScheduledBatch& Scheduler::schedule(std::int64_t now_us) {
  if (in_flight_) fail(ErrorCode::kInternal, "schedule() before the update() of the last step");
  retired_.clear();
  blocks_ran_out_ = any_paused_ || !batch_.preempted.empty();
  batch_.items.clear();
  batch_.preempted.clear();
  batch_.num_tokens = 0;
  now_us_ = now_us;
  budget_ = config_.max_num_batched_tokens;
  any_paused_ = false;
  while (Sequence* sequence = policy_->set_aside(context(running_))) {
    if (sequence->state != SequenceState::kRunning) {
      fail(ErrorCode::kInternal, "the scheduling policy set aside sequence ", sequence->id,
           ", which does not run");
    }
    ++totals_.set_aside;
    preempt(*sequence, policy_->set_aside_restarts());
  }
  promote_waiting();

  choose_seats();
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
  if ((batch_.preempted.empty() && !any_paused_) || running_.empty()) plan_waiting();
  batch_.graph_size = graph_size();
  in_flight_ = !batch_.items.empty();
  if (!in_flight_ && !sequences_.empty()) {
    fail(ErrorCode::kInternal, "the scheduling policy holds back all ", sequences_.size(),
         " sequences");
  }
  if (log_ != nullptr) log_->add(EventLog::Step{now_us, EventLog::plan_of(batch_)});
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
    if (may_pause(sequence)) return;
    Sequence& victim = choose_victim();
    ++(sequence.num_pending() == 1 ? totals_.evicted_for_decode : totals_.evicted_for_prefill);
    ++victim.evictions;
    preempt(victim);
    if (&victim == &sequence) return;
  }
  sequence.pause = 0;
  plan_item(sequence, num_tokens);
}

void Scheduler::plan_item(Sequence& sequence, int num_tokens) {
  batch_.items.push_back({&sequence, num_tokens, num_tokens == sequence.num_pending()});
  batch_.num_tokens += num_tokens;
  budget_ -= num_tokens;
}

void Scheduler::plan_waiting() {
  pledged_blocks_ = 0;
  for (const Sequence* sequence : running_) pledged_blocks_ += missing_blocks(*sequence);
  admission_.begin(running_);
  for (; budget_ > 0 && free_seats_ > 0; --free_seats_) {
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
  return watermark_blocks_ + blocks_.blocks_for(config_.readmission_steps * sharers);
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
  if (needed > spare || !admission_.has_room(sequence, match_)) return false;

  dequeue(sequence);
  if (sequence.preemptions == 0) admission_.note_belief(sequence);
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
  admission_.admitted(running_);
  return true;
}

int Scheduler::graph_size() const {
  const auto size =
      std::ranges::lower_bound(config_.graph_sizes, static_cast<int>(batch_.items.size()));
  return size == config_.graph_sizes.end() ? 0 : *size;
}

void Scheduler::update(std::span<const SampledToken> sampled) {
  if (!in_flight_) fail(ErrorCode::kInternal, "update() without a step");
  const auto samples = std::ranges::count_if(batch_.items, &ScheduledSequence::samples);
  if (static_cast<std::size_t>(samples) != sampled.size()) {
    fail(ErrorCode::kInternal, "the step samples ", samples, " tokens, got ", sampled.size());
  }
  if (log_ != nullptr) log_->add(EventLog::Update{{sampled.begin(), sampled.end()}});
  in_flight_ = false;
  compare_forecast();
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
    ++totals_.generated_tokens;
    if (answer.finished) {
      // At its limit it may have had more to say.
      retire(sequence, sequence.num_generated() < sequence.max_new_tokens);
      if (sequence.admission_mean > 0.0f) {
        accuracy_.add(sequence.admission_mean, sequence.admission_q90, sequence.num_generated());
      }
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

void Scheduler::compare_forecast() {
  window_forecast_ = std::max(window_forecast_, admission_.forecast_blocks());
  window_used_ = std::max<std::int64_t>(window_used_, blocks_.num_used());
  if (++window_steps_ < SchedulerStats::kForecastWindow) return;
  if (window_forecast_ > 0) {
    totals_.forecast_error =
        static_cast<double>(window_forecast_ - window_used_) / config_.num_blocks;
  }
  window_steps_ = 0;
  window_forecast_ = 0;
  window_used_ = 0;
}

void Scheduler::retire(Sequence& sequence, bool ended) {
  admission_.observe(sequence, ended);
  blocks_.release(sequence);
  sequence.state = SequenceState::kFinished;
  const auto entry = sequences_.find(sequence.id);
  retired_.push_back(std::move(entry->second));
  sequences_.erase(entry);
}

SchedulingContext Scheduler::context(std::span<Sequence* const> running) const {
  return {
      now_us_, running, config_.max_num_seqs, blocks_.num_available(), admission_.history().mean(),
      &blocks_};
}

const Sequence* Scheduler::find(SequenceId id) const {
  const auto entry = sequences_.find(id);
  return entry == sequences_.end() ? nullptr : entry->second.get();
}

SchedulerStats Scheduler::stats() const {
  SchedulerStats stats = totals_;
  stats.num_waiting = static_cast<int>(policy_->size());
  stats.num_resting = static_cast<int>(std::ranges::count_if(running_, &Sequence::resting));
  stats.num_running = static_cast<int>(running_.size()) - stats.num_resting;
  stats.free_blocks = blocks_.num_free();
  stats.cached_blocks = blocks_.num_cached();
  stats.used_blocks = blocks_.num_used();
  for (const Sequence* sequence : running_) stats.promised_blocks += missing_blocks(*sequence);
  stats.forecast_blocks = admission_.forecast_blocks();
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

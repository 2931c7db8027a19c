// The scheduler's part that gives way when KV blocks run out: pauses, victims, preemption.
#include <algorithm>

#include "base/check.h"
#include "scheduler/scheduler.h"

namespace deinfer {

const Sequence* Scheduler::protected_sequence() const {
  return *std::ranges::min_element(
      running_, [](const Sequence* a, const Sequence* b) { return runs_before(*a, *b); });
}

bool Scheduler::may_pause(Sequence& sequence) {
  if (sequence.pause >= config_.max_pause || &sequence == protected_sequence()) return false;
  ++sequence.pause;
  ++totals_.paused_steps;
  any_paused_ = true;
  return true;
}

Sequence& Scheduler::choose_victim() {
  const Sequence* first = protected_sequence();
  candidates_.clear();
  for (Sequence* sequence : running_) {
    if (sequence == first || admission_.pinned(*sequence)) continue;
    sequence->expected_remaining = admission_.expected_remaining(*sequence);
    candidates_.push_back(sequence);
  }
  if (candidates_.empty()) {
    fail(ErrorCode::kInternal, "no KV block and no victim beside sequence ", first->id, " of ",
         running_.size());
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
  if (restart) {
    totals_.generated_tokens -= sequence.num_generated();
    sequence.tokens.resize(static_cast<std::size_t>(sequence.prompt_length));
  }
  ++sequence.preemptions;
  sequence.pause = 0;
  sequence.resting = false;
  ++totals_.num_preemptions;
  std::erase(running_, &sequence);
  enqueue(sequence);
  batch_.preempted.push_back(sequence.id);
}

}  // namespace deinfer

// The scheduler's part that lets more sequences than there are seats take turns.
#include <algorithm>

#include "scheduler/scheduler.h"

namespace deinfer {

float Scheduler::turn_of(Sequence& sequence) const {
  if (sequence.turn_tokens != sequence.num_generated()) {
    sequence.turn = policy_->turn(sequence);
    sequence.turn_tokens = sequence.num_generated();
  }
  return sequence.turn;
}

bool Scheduler::sits_before(Sequence& a, Sequence& b, const Sequence* first) const {
  if (&a == first || &b == first) return &a == first && &b != first;
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.promoted != b.promoted) return a.promoted;
  const bool known = a.expected_length.known();
  if (known != b.expected_length.known()) return !known;
  if (known && turn_of(a) != turn_of(b)) return turn_of(a) > turn_of(b);
  return runs_before(a, b);
}

void Scheduler::promote_running() {
  for (Sequence* sequence : running_) {
    if (sequence->promoted || sequence->promotion_us > now_us_) continue;
    sequence->promoted = true;
    ++totals_.num_promotions;
  }
}

void Scheduler::choose_seats() {
  order_ = running_;
  for (Sequence* sequence : running_) sequence->resting = false;
  const auto running = static_cast<int>(running_.size());
  const int seats = config_.num_seats();
  free_seats_ = config_.max_num_seqs - running;
  if (running < seats) return;
  const bool turns = !blocks_ran_out_ && policy_->takes_turns(context(running_));
  if (running == seats && !turns) return;

  promote_running();
  const Sequence* first = protected_sequence();
  const auto before = [&](Sequence* a, Sequence* b) { return sits_before(*a, *b, first); };
  ranking_ = running_;
  const auto keep = [&](int count) {
    std::nth_element(ranking_.begin(), ranking_.begin() + count, ranking_.end(), before);
    ranking_.resize(static_cast<std::size_t>(count));
  };
  if (running > seats) keep(seats);
  free_seats_ = turns ? seats_to_leave(first) : 0;
  if (free_seats_ > 0) keep(seats - free_seats_);
  if (ranking_.size() == running_.size()) return;
  for (Sequence* sequence : running_) sequence->resting = true;
  for (Sequence* sequence : ranking_) sequence->resting = false;
  std::erase_if(order_, [](const Sequence* sequence) { return sequence->resting; });
}

int Scheduler::seats_to_leave(const Sequence* first) {
  Sequence* next = policy_->next(context(running_));
  if (next == nullptr) return 0;
  admission_.begin(running_);
  if (!admission_.whole_answers_fit(*next)) return 0;
  const auto gives_way = [&](Sequence* sequence) {
    return sequence->expected_length.known() && sits_before(*next, *sequence, first);
  };
  const auto willing = static_cast<int>(std::ranges::count_if(ranking_, gives_way));
  // Prompts share what the others leave of the step's tokens; those behind are like the first.
  const int spare = budget_ - static_cast<int>(ranking_.size());
  const int fitting = std::max(1, spare / std::max(1, next->num_pending()));
  return std::min({willing, fitting, static_cast<int>(policy_->size())});
}

}  // namespace deinfer

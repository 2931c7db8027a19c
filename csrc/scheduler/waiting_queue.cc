#include "scheduler/waiting_queue.h"

#include <algorithm>

namespace deinfer {

bool WaitingQueue::ByKey::operator()(const Entry& a, const Entry& b) const {
  if (a.sequence->priority != b.sequence->priority) {
    return a.sequence->priority > b.sequence->priority;
  }
  if (a.key != b.key) return a.key < b.key;
  return runs_before(*a.sequence, *b.sequence);
}

void WaitingQueue::push(Sequence& sequence, double key) {
  known_.insert({rank(sequence, key), &sequence});
}

Sequence* WaitingQueue::first(double unknown_key) const {
  if (unknown_.empty()) return known_.empty() ? nullptr : known_.begin()->sequence;
  Sequence* unknown = *unknown_.begin();
  if (known_.empty()) return unknown;
  const Entry other{rank(*unknown, unknown_key), unknown};
  return ByKey{}(*known_.begin(), other) ? known_.begin()->sequence : unknown;
}

void KeyedPolicy::push(Sequence& sequence) {
  if (sequence.expected_remaining > 0.0f) {
    queue_.push(sequence, key(sequence.expected_remaining));
  } else {
    queue_.push_unknown(sequence);
  }
}

void KeyedPolicy::remove(Sequence& sequence) {
  if (sequence.expected_remaining > 0.0f) {
    queue_.remove(sequence, key(sequence.expected_remaining));
  } else {
    queue_.remove_unknown(sequence);
  }
}

Sequence* KeyedPolicy::next(const SchedulingContext& context) {
  return queue_.first(key(std::max(context.prior_length, 1.0f)));
}

}  // namespace deinfer

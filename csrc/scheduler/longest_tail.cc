// For offline jobs: first come, first served while many wait, then the longest first, so that the
// last sequences to run do not run alone. Longest first all along would fill the KV cache with long
// sequences only.
#include <algorithm>

#include "scheduler/waiting_queue.h"

namespace deinfer {
namespace {

class LongestTailPolicy final : public SchedulingPolicy {
 public:
  explicit LongestTailPolicy(double tail_factor) : tail_factor_(tail_factor) {}

  void push(Sequence& sequence) override {
    by_arrival_.push_unknown(sequence);
    if (sequence.expected_remaining > 0.0f) {
      longest_first_.push(sequence, -sequence.expected_remaining);
    } else {
      longest_first_.push_unknown(sequence);
    }
  }
  void remove(Sequence& sequence) override {
    by_arrival_.remove_unknown(sequence);
    if (sequence.expected_remaining > 0.0f) {
      longest_first_.remove(sequence, -sequence.expected_remaining);
    } else {
      longest_first_.remove_unknown(sequence);
    }
  }
  std::size_t size() const override { return by_arrival_.size(); }

  Sequence* next(const SchedulingContext& context) override {
    const bool tail = static_cast<double>(size()) < tail_factor_ * context.max_num_seqs;
    if (!tail) return by_arrival_.first(0.0);
    return longest_first_.first(-std::max(context.prior_length, 1.0f));
  }

 private:
  const double tail_factor_;
  WaitingQueue by_arrival_;
  WaitingQueue longest_first_;
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_longest_tail_policy(const PolicyConfig& config) {
  return std::make_unique<LongestTailPolicy>(config.tail_factor);
}

}  // namespace deinfer

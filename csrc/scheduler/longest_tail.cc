// For offline jobs: first come, first served while many wait, then the longest first, so that the
// last sequences to run do not run alone. Longest first all along would fill the KV cache with long
// sequences only.
#include <algorithm>

#include "scheduler/waiting_queue.h"

namespace deinfer {
namespace {

/// Whoever runs late decides when the job ends, so what counts is how long an answer may become,
/// not how long it is on average.
constexpr float kDeviations = 4.0f;
/// Tokens after which a sequence's turn is looked at again.
constexpr int kQuantum = 8;

class LongestTailPolicy final : public SchedulingPolicy {
 public:
  explicit LongestTailPolicy(const PolicyConfig& config)
      : tail_factor_(config.tail_factor), take_turns_(config.take_turns) {}

  void push(Sequence& sequence) override {
    by_arrival_.push_unknown(sequence);
    if (sequence.expected_length.known()) {
      longest_first_.push(sequence, -turn(sequence));
    } else {
      longest_first_.push_unknown(sequence);
    }
  }
  void remove(Sequence& sequence) override {
    by_arrival_.remove_unknown(sequence);
    if (sequence.expected_length.known()) {
      longest_first_.remove(sequence, -turn(sequence));
    } else {
      longest_first_.remove_unknown(sequence);
    }
  }
  std::size_t size() const override { return by_arrival_.size(); }

  Sequence* next(const SchedulingContext& context) override {
    if (!in_tail(context)) return by_arrival_.first(0.0);
    return longest_first_.first(-std::max(context.prior_length, 1.0f));
  }

  bool takes_turns(const SchedulingContext& context) const override {
    return take_turns_ && in_tail(context);
  }
  /// Tokens that may be left: those of an answer kDeviations beyond what is expected, but at most
  /// to its limit, which also stands for those of which nothing is known, or no longer is.
  float turn(const Sequence& sequence) const override {
    const int generated = sequence.num_generated() - sequence.num_generated() % kQuantum;
    const auto most = static_cast<float>(sequence.max_new_tokens - generated);
    const float left = sequence.expected_length.upper_remaining(generated, kDeviations);
    return left > 0.0f ? std::min(left, most) : most;
  }

 private:
  bool in_tail(const SchedulingContext& context) const {
    return static_cast<double>(size()) < tail_factor_ * context.max_num_seqs;
  }

  const double tail_factor_;
  const bool take_turns_;
  WaitingQueue by_arrival_;
  WaitingQueue longest_first_;
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_longest_tail_policy(const PolicyConfig& config) {
  return std::make_unique<LongestTailPolicy>(config);
}

}  // namespace deinfer

// Highest response ratio next: short sequences first, and those that have waited long for their
// length. Ratios change with time, so sequences wait in buckets of similar length, in order of
// arrival, and only the buckets' heads are compared.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>

#include "scheduler/scheduling_policy.h"

namespace deinfer {
namespace {

/// Added to every length, in mean answers: it bounds the advantage of the shortest, at whose cost
/// the longest would wait half as long again.
constexpr double kRatioOffset = 0.3;
/// Lengths in a bucket differ by at most a factor of 2^(1/4).
constexpr int kBucketsPerOctave = 4;
/// From 1 to 2^24 tokens, beyond which lengths share the last bucket.
constexpr std::size_t kBuckets = 24 * kBucketsPerOctave;

struct Before {
  bool operator()(const Sequence* a, const Sequence* b) const { return runs_before(*a, *b); }
};
using Fifo = std::set<Sequence*, Before>;

/// The waiting sequences of one priority.
struct Level {
  Fifo promoted;
  Fifo unknown;  // of unknown length
  std::array<Fifo, kBuckets> buckets;
  std::size_t size = 0;
};

class HrrnPolicy final : public SchedulingPolicy {
 public:
  void push(Sequence& sequence) override {
    Level& level = levels_[sequence.priority];
    fifo(level, sequence).insert(&sequence);
    ++level.size;
    ++size_;
  }

  void remove(Sequence& sequence) override {
    const auto entry = levels_.find(sequence.priority);
    fifo(entry->second, sequence).erase(&sequence);
    --size_;
    if (--entry->second.size == 0) levels_.erase(entry);
  }

  std::size_t size() const override { return size_; }

  Sequence* next(const SchedulingContext& context) override {
    if (levels_.empty()) return nullptr;
    const Level& level = levels_.begin()->second;
    if (!level.promoted.empty()) return *level.promoted.begin();
    Sequence* best = nullptr;
    double best_ratio = 0.0;
    const auto compare = [&](const Fifo& fifo, bool known) {
      if (fifo.empty()) return;
      Sequence* head = *fifo.begin();
      const double own = known ? head->expected_remaining : std::max(context.prior_length, 1.0f);
      const double length = own + kRatioOffset * context.prior_length;
      const double waited = static_cast<double>(context.now_us - head->arrival_us);
      const double ratio = std::max(waited, 0.0) / length;
      if (best == nullptr || ratio > best_ratio ||
          (ratio == best_ratio && runs_before(*head, *best))) {
        best = head;
        best_ratio = ratio;
      }
    };
    compare(level.unknown, false);
    for (const Fifo& fifo : level.buckets) compare(fifo, true);
    return best;
  }

 private:
  static Fifo& fifo(Level& level, const Sequence& sequence) {
    if (sequence.promoted) return level.promoted;
    if (sequence.expected_remaining <= 0.0f) return level.unknown;
    const double octave = std::log2(std::max(sequence.expected_remaining, 1.0f));
    const auto bucket = static_cast<std::size_t>(octave * kBucketsPerOctave);
    return level.buckets[std::min(bucket, kBuckets - 1)];
  }

  std::map<int, Level, std::greater<>> levels_;  // by priority, the highest first
  std::size_t size_ = 0;
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_hrrn_policy(const PolicyConfig&) {
  return std::make_unique<HrrnPolicy>();
}

}  // namespace deinfer

// Static batches: the method of arXiv 2305.13144 ("Response Length Perception and Sequence
// Scheduling"), written after the paper and the behaviour of its public code, with the failures
// recomputed for the sequences that failed (the code recomputes others in their place).
//
// A group of sequences is sorted by expected length and cut into batches. A batch starts when
// nothing runs and has its seats to itself until its last sequence has ended or was set aside. If
// KV blocks or the token budget leave no room for all of it, its rest may join until the first
// member ends, and after that makes a batch of its own.
#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <set>
#include <utility>

#include "base/check.h"
#include "scheduler/scheduling_policy.h"

namespace deinfer {
namespace {

struct Batch {
  std::deque<Sequence*> waiting;  // members that have not started
  int cap = 0;                    // generated tokens; 0: none
};

class StaticBatchPolicy final : public SchedulingPolicy {
 public:
  explicit StaticBatchPolicy(StaticBatchConfig config) : config_(std::move(config)) {}

  void push(Sequence& sequence) override {
    // What lost its KV, by failing or because blocks ran out, is recomputed with its group.
    if (sequence.preemptions > 0) {
      failed_.push_back(&sequence);
    } else {
      arrived_.insert(&sequence);
    }
  }

  void remove(Sequence& sequence) override {
    if (erase(current_.waiting, sequence) || erase(failed_, sequence)) return;
    for (Batch& batch : planned_) {
      if (erase(batch.waiting, sequence)) return;
    }
    arrived_.erase(&sequence);
  }

  std::size_t size() const override {
    std::size_t count = arrived_.size() + failed_.size() + current_.waiting.size();
    for (const Batch& batch : planned_) count += batch.waiting.size();
    return count;
  }

  Sequence* next(const SchedulingContext& context) override {
    const std::size_t running = context.running.size();
    if (running == 0) {
      if (current_.waiting.empty()) start_batch(context.max_num_seqs);
      most_running_ = 0;
    }
    if (running < most_running_) return nullptr;  // a member has ended: nobody joins any more
    most_running_ = running;
    return current_.waiting.empty() ? nullptr : current_.waiting.front();
  }

  Sequence* victim(const SchedulingContext& context) override {
    return *std::ranges::max_element(context.running, Before{});
  }

  Sequence* set_aside(const SchedulingContext& context) override {
    if (current_.cap == 0) return nullptr;
    const auto failed = std::ranges::find_if(context.running, [&](const Sequence* sequence) {
      return sequence->num_generated() >= current_.cap;
    });
    return failed == context.running.end() ? nullptr : *failed;
  }
  bool set_aside_restarts() const override { return config_.restart_failures; }

 private:
  struct Before {
    bool operator()(const Sequence* a, const Sequence* b) const { return runs_before(*a, *b); }
  };

  static bool erase(std::deque<Sequence*>& from, Sequence& sequence) {
    const auto found = std::ranges::find(from, &sequence);
    if (found == from.end()) return false;
    from.erase(found);
    return true;
  }

  /// What the sequence is taken to generate, in tokens; unknown: as much as it may.
  static int expected(const Sequence& sequence) {
    const float mean = sequence.expected_length.mean();
    const auto most = static_cast<float>(sequence.max_new_tokens);
    return static_cast<int>(std::ceil(mean > 0.0f ? std::min(mean, most) : most));
  }

  int size_of_bucket(int bucket) const {
    const auto index = static_cast<std::size_t>(bucket);
    const std::vector<int>& sizes = config_.bucket_batch_sizes;
    return index < sizes.size() ? sizes[index] : config_.batch_size;
  }

  /// Makes the next batch current: of the planned ones, of the group's failures, or of a new group.
  void start_batch(int seats) {
    std::erase_if(planned_, [](const Batch& batch) { return batch.waiting.empty(); });
    if (planned_.empty() && !failed_.empty()) {
      cut({failed_.begin(), failed_.end()}, config_.batch_size, seats, 0);
      failed_.clear();
    } else if (planned_.empty()) {
      plan_group(seats);
    }
    current_ = {};
    if (planned_.empty()) return;
    current_ = std::move(planned_.front());
    planned_.pop_front();
  }

  void plan_group(int seats) {
    std::vector<Sequence*> group;
    while (!arrived_.empty() && static_cast<int>(group.size()) < config_.group) {
      group.push_back(*arrived_.begin());
      arrived_.erase(arrived_.begin());
    }
    if (config_.sort) std::ranges::stable_sort(group, {}, [](auto* s) { return expected(*s); });
    if (config_.bucket_tokens > 0) {
      plan_buckets(group, seats);
    } else {
      cut(group, config_.batch_size, seats, -1);
    }
  }

  /// Too few sequences for half a batch (or for 16) go to the next longer bucket that is not empty.
  void plan_buckets(const std::vector<Sequence*>& group, int seats) {
    std::map<int, std::vector<Sequence*>> buckets;
    for (Sequence* sequence : group) {
      buckets[(expected(*sequence) - 1) / config_.bucket_tokens].push_back(sequence);
    }
    for (auto bucket = buckets.begin(); bucket != buckets.end(); ++bucket) {
      auto& [index, members] = *bucket;
      const auto size = static_cast<std::size_t>(size_of_bucket(index));
      const auto enough = std::max<std::size_t>(size / 2, 16);
      const auto longer = std::next(bucket);
      const std::size_t rest = members.size() % size;
      if (longer != buckets.end() && rest > 0 && rest < enough) {
        const auto first = members.end() - static_cast<std::ptrdiff_t>(rest);
        longer->second.insert(longer->second.end(), first, members.end());
        members.erase(first, members.end());
      }
      cut(members, static_cast<int>(size), seats, (index + 1) * config_.bucket_tokens);
    }
  }

  /// Plans batches of at most `size` sequences; cap -1: the longest expected length of each.
  void cut(const std::vector<Sequence*>& members, int size, int seats, int cap) {
    const auto step = static_cast<std::size_t>(std::min(size, seats));
    for (std::size_t begin = 0; begin < members.size(); begin += step) {
      const auto first = members.begin() + static_cast<std::ptrdiff_t>(begin);
      const auto last =
          members.begin() + static_cast<std::ptrdiff_t>(std::min(begin + step, members.size()));
      Batch batch{{first, last}, config_.collect_failures ? cap : 0};
      if (batch.cap < 0) {
        batch.cap = 0;
        for (const Sequence* s : batch.waiting) batch.cap = std::max(batch.cap, expected(*s));
      }
      planned_.push_back(std::move(batch));
    }
  }

  const StaticBatchConfig config_;
  std::set<Sequence*, Before> arrived_;  // not yet in a group
  std::deque<Batch> planned_;            // of the group, in the order in which they run
  Batch current_;
  std::size_t most_running_ = 0;  // members of the current batch at once so far
  std::deque<Sequence*> failed_;  // of the group
};

}  // namespace

StaticBatchConfig StaticBatchConfig::plain(int batch_size) {
  StaticBatchConfig config;
  config.batch_size = batch_size;
  config.sort = false;
  config.bucket_tokens = 0;
  config.collect_failures = false;
  return config;
}

void StaticBatchConfig::validate() const {
  check_argument(group >= 1, "static batches: group must be at least 1, got ", group);
  check_argument(batch_size >= 1, "static batches: batch_size must be at least 1, got ",
                 batch_size);
  check_argument(bucket_tokens >= 0, "static batches: bucket_tokens must be at least 0, got ",
                 bucket_tokens);
  for (const int size : bucket_batch_sizes) {
    check_argument(size >= 1, "static batches: bucket_batch_sizes must be at least 1, got ", size);
  }
}

std::unique_ptr<SchedulingPolicy> make_static_policy(const PolicyConfig& config) {
  const StaticBatchConfig& batches = config.static_batches;
  return std::make_unique<StaticBatchPolicy>(StaticBatchConfig::plain(batches.batch_size));
}

std::unique_ptr<SchedulingPolicy> make_static_bucket_policy(const PolicyConfig& config) {
  return std::make_unique<StaticBatchPolicy>(config.static_batches);
}

}  // namespace deinfer

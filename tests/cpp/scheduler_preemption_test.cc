// Who gives way when KV blocks run out, and when it comes back.
#include <algorithm>
#include <deque>

#include "scheduler_fixture.h"

namespace deinfer {
namespace {

using namespace test;

TEST(Scheduler, PreemptionKeepsTokensAndPlaceAndSparesTheOldest) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
  config.max_pause = 0;
  config.enable_prefix_caching = false;
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 2; ++id) scheduler.add(distinct(id, 8, 20));  // up to 7 blocks each
  int step = 0;
  for (;; ++step) {
    const ScheduledBatch& batch = scheduler.schedule(step);
    const bool preempted = !batch.preempted.empty();
    if (preempted) {
      EXPECT_EQ(batch.preempted, (Ids{2}));
      EXPECT_EQ(ids(batch), (Ids{1}));
    }
    answer(scheduler, batch);
    if (preempted) break;
  }
  const Sequence* victim = scheduler.find(2);
  ASSERT_NE(victim, nullptr);
  EXPECT_EQ(victim->state, SequenceState::kWaiting);
  EXPECT_EQ(victim->num_generated(), step);
  EXPECT_EQ(victim->num_computed, 0);
  const int lost = victim->max_computed;
  EXPECT_EQ(lost, 8 + step - 1);

  scheduler.add(distinct(3, 1, 2));  // would fit at once, but 2 is older
  while (scheduler.find(1) != nullptr) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    EXPECT_EQ(ids(batch), (Ids{1})) << "hysteresis: 2 waits for its blocks and growth";
    answer(scheduler, batch);
  }
  const ScheduledBatch& resumed = scheduler.schedule(0);
  EXPECT_EQ(ids(resumed), (Ids{2, 3}));
  EXPECT_EQ(tokens_of(resumed, 2), victim->length());
  EXPECT_TRUE(resumed.items[0].samples);
  answer(scheduler, resumed);
  EXPECT_EQ(scheduler.stats().num_preemptions, 1);
  EXPECT_EQ(scheduler.stats().recomputed_tokens, lost);
}

TEST(Scheduler, ReadmissionNeedsMoreRoomThanAdmission) {
  SchedulerConfig config = small_config();
  config.block_size = 1;
  config.num_blocks = 60;
  config.max_pause = 0;
  config.enable_prefix_caching = false;
  Scheduler scheduler(config, make_policy("fcfs"));
  // With 20 tokens each the pool is full and 3 gives way. At the end of 2 there is room for 3
  // again, but not for long beside the growing 1: it would be preempted once more.
  scheduler.add(distinct(1, 10, 46));
  scheduler.add(distinct(2, 10, 16));
  scheduler.add(distinct(3, 10, 46));
  Ids preempted;
  bool had_room = false;
  while (scheduler.has_unfinished()) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    preempted.insert(preempted.end(), batch.preempted.begin(), batch.preempted.end());
    answer(scheduler, batch);
    const Sequence* third = scheduler.find(3);
    if (third != nullptr && third->state == SequenceState::kWaiting && scheduler.find(1)) {
      had_room |= scheduler.stats().free_blocks > third->length();
    }
  }
  EXPECT_EQ(preempted, (Ids{3})) << "the latest, and once";
  EXPECT_TRUE(had_room);
}

TEST(Scheduler, HigherPriorityTakesBlocksFromLower) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
  config.max_pause = 0;
  config.enable_prefix_caching = false;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 8, 20));
  answer(scheduler, scheduler.schedule(0));
  Sequence urgent = distinct(2, 8, 20);
  urgent.priority = 5;
  scheduler.add(std::move(urgent));
  Ids preempted;
  while (scheduler.has_unfinished()) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    preempted.insert(preempted.end(), batch.preempted.begin(), batch.preempted.end());
    answer(scheduler, batch);
  }
  EXPECT_EQ(preempted, (Ids{1}));
}

TEST(Scheduler, BlocksOfAWithdrawnChunkAreNotShared) {
  SchedulerConfig config = small_config();
  config.block_size = 1;
  config.num_blocks = 84;
  config.max_pause = 0;
  config.max_prefill_chunk = 8;
  Scheduler scheduler(config, make_policy("fcfs"));
  Sequence decoding = distinct(1, 1, 6);
  decoding.priority = 2;
  Sequence urgent = distinct(3, 34, 1);
  urgent.priority = 1;
  scheduler.add(std::move(decoding));
  scheduler.add(distinct(2, 48, 1));
  answer(scheduler, scheduler.schedule(0));
  scheduler.add(std::move(urgent));
  for (int step = 2; step <= 5; ++step) answer(scheduler, scheduler.schedule(0));
  ASSERT_EQ(scheduler.find(2)->num_computed, 40);
  // 2 gets the last 6 blocks for its chunk; then 3 needs one, and 2 is preempted with its chunk.
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(batch.preempted, (Ids{2}));
  EXPECT_EQ(ids(batch), (Ids{1, 3}));
  EXPECT_EQ(batch.num_tokens, 2);
  answer(scheduler, batch);
  answer(scheduler, scheduler.schedule(0));
  const ScheduledBatch& resumed = scheduler.schedule(0);
  ASSERT_EQ(ids(resumed), (Ids{2}));
  EXPECT_EQ(resumed.items[0].sequence->num_computed, 40) << "what was computed, and no more";
  answer(scheduler, resumed);
  EXPECT_EQ(scheduler.stats().recomputed_tokens, 0);
  EXPECT_EQ(scheduler.stats().prefix_hit_tokens, 0);
}

/// Highest response ratio next, and a cap that sets overrunning sequences aside once: shows that
/// policies with predicted lengths, a clock and failure collection fit the interface.
class HrrnWithCap final : public SchedulingPolicy {
 public:
  explicit HrrnWithCap(int cap) : cap_(cap) {}
  void push(Sequence& sequence) override { waiting_.push_back(&sequence); }
  void remove(Sequence& sequence) override { std::erase(waiting_, &sequence); }
  std::size_t size() const override { return waiting_.size(); }
  Sequence* next(const SchedulingContext& context) override {
    const auto ratio = [&](const Sequence* s) {
      return static_cast<double>(context.now_us - s->arrival_us) / s->expected_length.mean();
    };
    const auto best = std::ranges::max_element(waiting_, {}, ratio);
    return best == waiting_.end() ? nullptr : *best;
  }
  Sequence* victim(const SchedulingContext& context) override { return context.running.back(); }
  Sequence* set_aside(const SchedulingContext& context) override {
    for (Sequence* s : context.running) {
      if (s->preemptions == 0 && s->num_generated() >= cap_) return s;
    }
    return nullptr;
  }

 private:
  int cap_;
  std::deque<Sequence*> waiting_;
};

TEST(Scheduler, PoliciesMayUsePredictionsTheClockAndSetSequencesAside) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  Scheduler scheduler(config, std::make_unique<HrrnWithCap>(3));
  for (SequenceId id = 1; id <= 3; ++id) {
    Sequence sequence = distinct(id, 4, 6);
    sequence.expected_length = LengthDistribution::point(id == 1 ? 100.0f : 10.0f);
    sequence.arrival_us = id == 3 ? 500 : 0;
    scheduler.add(std::move(sequence));
  }
  Ids started;
  for (std::int64_t now_us = 1000; scheduler.has_unfinished(); ++now_us) {
    const ScheduledBatch& batch = scheduler.schedule(now_us);
    const SequenceId id = batch.items.at(0).sequence->id;
    if (started.empty() || started.back() != id) started.push_back(id);
    answer(scheduler, batch);
  }
  // 2 has waited longer than 3 for as short an answer; each is set aside once after 3 tokens, and 2
  // still has the highest ratio then.
  EXPECT_EQ(started, (Ids{2, 3, 1}));
  EXPECT_EQ(scheduler.stats().num_preemptions, 3);
}

}  // namespace
}  // namespace deinfer

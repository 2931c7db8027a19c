#include "scheduler/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "deinfer/error.h"

namespace deinfer {
namespace {

SchedulerConfig small_config() {
  SchedulerConfig config;
  config.max_num_seqs = 8;
  config.max_num_batched_tokens = 64;
  config.block_size = 4;
  config.num_blocks = 64;
  config.watermark = 0.0;
  return config;
}

/// Prompts differ in every token between first_token values that are far apart.
Sequence make_sequence(SequenceId id, int prompt_length, int max_new_tokens,
                       TokenId first_token = 0) {
  Sequence sequence;
  sequence.id = id;
  sequence.arrival = id;
  sequence.tokens.resize(static_cast<std::size_t>(prompt_length));
  std::iota(sequence.tokens.begin(), sequence.tokens.end(), first_token);
  sequence.prompt_length = prompt_length;
  sequence.max_new_tokens = max_new_tokens;
  return sequence;
}

Sequence distinct(SequenceId id, int prompt_length, int max_new_tokens) {
  return make_sequence(id, prompt_length, max_new_tokens, static_cast<TokenId>(id) * 10'000);
}

/// Runs one step in which every sampled sequence gets token 7 and ends at its max_new_tokens.
void answer(Scheduler& scheduler, const ScheduledBatch& batch) {
  std::vector<SampledToken> sampled;
  for (const ScheduledSequence& item : batch.items) {
    if (!item.samples) continue;
    const Sequence& s = *item.sequence;
    sampled.push_back({s.id, 7, s.num_generated() + 1 == s.max_new_tokens});
  }
  scheduler.update(sampled);
}

std::vector<SequenceId> ids(const ScheduledBatch& batch) {
  std::vector<SequenceId> result;
  for (const ScheduledSequence& item : batch.items) result.push_back(item.sequence->id);
  return result;
}

int tokens_of(const ScheduledBatch& batch, SequenceId id) {
  for (const ScheduledSequence& item : batch.items) {
    if (item.sequence->id == id) return item.num_tokens;
  }
  return 0;
}

/// The error that fn throws, as "code: message"; empty when it throws none.
template <typename Fn>
std::string error_of(Fn&& fn) {
  try {
    fn();
  } catch (const Error& e) {
    return std::to_string(static_cast<int>(e.code())) + ": " + e.what();
  }
  return {};
}

std::string prefix(ErrorCode code) { return std::to_string(static_cast<int>(code)) + ": "; }

using Ids = std::vector<SequenceId>;

TEST(Scheduler, StartsInOrderOfPriorityThenArrival) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  Scheduler scheduler(config, make_policy("fcfs"));
  for (const SequenceId id : {3u, 1u, 2u, 4u}) {
    Sequence sequence = distinct(id, 5, 1);
    sequence.priority = id == 4 ? 1 : 0;
    scheduler.add(std::move(sequence));
  }
  Ids order;
  while (scheduler.has_unfinished()) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    ASSERT_EQ(batch.items.size(), 1u);
    order.push_back(batch.items[0].sequence->id);
    answer(scheduler, batch);
  }
  EXPECT_EQ(order, (Ids{4, 1, 2, 3}));
  EXPECT_TRUE(scheduler.schedule(0).items.empty());
}

TEST(Scheduler, PrefillsInChunksBesideDecodes) {
  SchedulerConfig config = small_config();
  config.max_num_batched_tokens = 10;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 4, 20));
  answer(scheduler, scheduler.schedule(0));
  scheduler.add(distinct(2, 25, 2));
  for (const int chunk : {9, 9, 7}) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    EXPECT_EQ(ids(batch), (Ids{1, 2}));
    EXPECT_EQ(tokens_of(batch, 1), 1) << "decodes never wait for a prompt";
    EXPECT_EQ(tokens_of(batch, 2), chunk);
    EXPECT_EQ(batch.items[1].samples, chunk == 7);
    EXPECT_EQ(batch.num_tokens, 1 + chunk);
    answer(scheduler, batch);
  }
}

TEST(Scheduler, ChunkLimitLetsAShortPromptPassALongOne) {
  SchedulerConfig config = small_config();
  config.max_num_batched_tokens = 16;
  config.max_prefill_chunk = 8;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 80, 2));
  scheduler.add(distinct(2, 6, 2));
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(tokens_of(batch, 1), 8);
  EXPECT_EQ(tokens_of(batch, 2), 6);
}

TEST(Scheduler, EveryRunningSequenceDecodesInEveryStep) {
  SchedulerConfig config = small_config();
  config.max_num_batched_tokens = 3;  // below max_num_seqs
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 6; ++id) scheduler.add(distinct(id, 1, 5));
  for (int step = 0; step < 5; ++step) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    EXPECT_EQ(ids(batch), (Ids{1, 2, 3}));
    answer(scheduler, batch);
  }
  EXPECT_EQ(ids(scheduler.schedule(0)), (Ids{4, 5, 6}));
}

TEST(Scheduler, SamplesOfOnePromptPrefillItOnceInOneStep) {
  SchedulerConfig config = small_config();
  config.max_num_batched_tokens = 256;
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 4; ++id) scheduler.add(make_sequence(id, 50, 4));
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(batch.items.size(), 4u);
  EXPECT_EQ(tokens_of(batch, 1), 50);
  for (SequenceId id = 2; id <= 4; ++id) EXPECT_EQ(tokens_of(batch, id), 2);
  for (const ScheduledSequence& item : batch.items) {
    EXPECT_TRUE(item.samples);
    for (std::size_t block = 0; block < 12; ++block) {
      EXPECT_EQ(item.sequence->block_table[block], batch.items[0].sequence->block_table[block]);
    }
  }
  EXPECT_EQ(scheduler.stats().used_blocks, 12 + 4);
  EXPECT_EQ(scheduler.stats().prefix_hit_tokens, 3 * 48);
  scheduler.check_invariants();
  answer(scheduler, batch);
}

TEST(Scheduler, AFinishedPromptIsFoundAgainAndReusePrefixFalseComputesAll) {
  Scheduler scheduler(small_config(), make_policy("fcfs"));
  scheduler.add(make_sequence(1, 21, 1));
  answer(scheduler, scheduler.schedule(0));
  EXPECT_FALSE(scheduler.has_unfinished());
  EXPECT_EQ(scheduler.stats().cached_blocks, 5);
  EXPECT_EQ(scheduler.stats().used_blocks, 0);
  scheduler.add(make_sequence(2, 21, 1));
  Sequence refuses = make_sequence(3, 21, 1);
  refuses.reuse_prefix = false;
  scheduler.add(std::move(refuses));
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(tokens_of(batch, 2), 1);
  EXPECT_EQ(tokens_of(batch, 3), 21);
}

TEST(Scheduler, RejectsWhatCanNeverRun) {
  SchedulerConfig config = small_config();
  config.num_blocks = 4;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 10, 6));
  const std::string too_long = error_of([&] { scheduler.add(distinct(2, 10, 7)); });
  EXPECT_EQ(too_long.find(prefix(ErrorCode::kOutOfMemory)), 0u) << too_long;
  for (const char* part : {"10 prompt tokens", "7 new ones", "5 KV blocks", "the pool has 4"}) {
    EXPECT_NE(too_long.find(part), std::string::npos) << too_long;
  }
  const auto rejected = [&](Sequence sequence) {
    const std::string error = error_of([&] { scheduler.add(std::move(sequence)); });
    EXPECT_EQ(error.find(prefix(ErrorCode::kInvalidArgument)), 0u) << error;
  };
  rejected(distinct(1, 4, 1));  // a known id
  rejected(distinct(3, 0, 1));
  rejected(distinct(4, 4, 0));
  Sequence inconsistent = distinct(5, 4, 1);
  inconsistent.prompt_length = 5;
  rejected(std::move(inconsistent));
  const std::string huge = error_of([&] { scheduler.add(distinct(6, 4, 2'147'483'647)); });
  EXPECT_EQ(huge.find(prefix(ErrorCode::kOutOfMemory)), 0u) << huge;
  EXPECT_EQ(scheduler.stats().num_waiting, 1);
}

TEST(Scheduler, RejectsABadConfiguration) {
  const auto rejected = [](auto&& change, const char* field) {
    SchedulerConfig config = small_config();
    change(config);
    const std::string error = error_of([&] { Scheduler(config, make_policy("fcfs")); });
    EXPECT_EQ(error.find(prefix(ErrorCode::kInvalidArgument) + field), 0u) << error;
  };
  rejected([](SchedulerConfig& c) { c.max_num_seqs = 0; }, "max_num_seqs");
  rejected([](SchedulerConfig& c) { c.max_num_batched_tokens = 0; }, "max_num_batched_tokens");
  rejected([](SchedulerConfig& c) { c.block_size = 0; }, "block_size");
  rejected([](SchedulerConfig& c) { c.num_blocks = -1; }, "num_blocks");
  rejected([](SchedulerConfig& c) { c.max_prefill_chunk = -1; }, "max_prefill_chunk");
  rejected([](SchedulerConfig& c) { c.watermark = 1.0; }, "watermark");
  EXPECT_NE(error_of([] { make_policy("lifo"); }).find("\"lifo\" is unknown; known: fcfs"),
            std::string::npos);
}

TEST(Scheduler, AbortsWaitingAndRunningSequences) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 9, 5));
  scheduler.add(distinct(2, 9, 5));
  scheduler.add(distinct(3, 9, 5));
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_THROW(scheduler.abort(2), Error) << "a step is under way";
  answer(scheduler, batch);
  EXPECT_TRUE(scheduler.abort(1));
  EXPECT_TRUE(scheduler.abort(2));
  EXPECT_FALSE(scheduler.abort(2));
  EXPECT_FALSE(scheduler.abort(99));
  EXPECT_EQ(scheduler.find(1), nullptr);
  EXPECT_EQ(scheduler.stats().used_blocks, 0);
  scheduler.check_invariants();
  EXPECT_EQ(ids(scheduler.schedule(0)), (Ids{3}));
}

TEST(Scheduler, TheWatermarkHoldsBackAdmissionButNotALoneSequence) {
  SchedulerConfig config = small_config();
  config.num_blocks = 20;
  config.watermark = 0.25;  // 5 blocks
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 5; ++id) scheduler.add(distinct(id, 15, 1));  // 4 blocks each
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(ids(batch), (Ids{1, 2, 3}));
  answer(scheduler, batch);
  answer(scheduler, scheduler.schedule(0));
  scheduler.add(distinct(6, 60, 20));  // the whole pool
  const ScheduledBatch& lone = scheduler.schedule(0);
  EXPECT_EQ(ids(lone), (Ids{6}));
}

TEST(Scheduler, AdmissionLeavesRoomForPromptsThatAreHalfComputed) {
  SchedulerConfig config = small_config();
  config.num_blocks = 20;
  config.max_prefill_chunk = 8;
  Scheduler scheduler(config, make_policy("fcfs"));
  scheduler.add(distinct(1, 60, 4));  // 15 blocks, two of them in the first step
  scheduler.add(distinct(2, 40, 4));
  scheduler.add(distinct(3, 8, 4));
  EXPECT_EQ(ids(scheduler.schedule(0)), (Ids{1})) << "2 does not fit beside 1, and 3 comes after 2";
}

TEST(Scheduler, PreemptionKeepsTokensAndPlaceAndSparesTheOldest) {
  SchedulerConfig config = small_config();
  config.num_blocks = 8;
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

TEST(Scheduler, TellsTheEngineWhenItBreaksTheProtocol) {
  Scheduler scheduler(small_config(), make_policy("fcfs"));
  EXPECT_THROW(scheduler.update({}), Error);
  scheduler.add(distinct(1, 3, 1));
  scheduler.schedule(0);
  EXPECT_THROW(scheduler.schedule(0), Error);
  EXPECT_THROW(scheduler.update({}), Error) << "a token is missing";
  const SampledToken wrong[] = {{2, 7, true}};
  EXPECT_THROW(scheduler.update(wrong), Error);
  Scheduler overrun(small_config(), make_policy("fcfs"));
  overrun.add(distinct(1, 3, 1));
  overrun.schedule(0);
  const SampledToken unfinished[] = {{1, 7, false}};
  EXPECT_THROW(overrun.update(unfinished), Error);
}

TEST(Scheduler, FinishedSequencesCanBeReadUntilTheNextStep) {
  Scheduler scheduler(small_config(), make_policy("fcfs"));
  scheduler.add(distinct(1, 3, 1));
  const Sequence* sequence = scheduler.schedule(0).items[0].sequence;
  const SampledToken last[] = {{1, 42, true}};
  scheduler.update(last);
  EXPECT_EQ(sequence->state, SequenceState::kFinished);
  EXPECT_EQ(sequence->tokens.back(), 42);
  EXPECT_EQ(scheduler.find(1), nullptr);
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

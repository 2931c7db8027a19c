// What a step computes: order, chunks, sharing, errors.
#include "scheduler_fixture.h"

namespace deinfer {
namespace {

using namespace test;

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
  rejected([](SchedulerConfig& c) { c.safety = 1.5; }, "safety");
  rejected([](SchedulerConfig& c) { c.history_window = 0; }, "history_window");
  rejected([](SchedulerConfig& c) { c.promotion.after_s = -1.0; }, "promotion.after_s");
  rejected([](SchedulerConfig& c) { c.max_pause = -1; }, "max_pause");
  rejected([](SchedulerConfig& c) { c.preempt_limit = -1; }, "preempt_limit");
  rejected([](SchedulerConfig& c) { c.graph_sizes = {4, 2}; }, "graph_sizes");
  EXPECT_NE(error_of([] { parse_admission("all"); }).find("admission=\"all\" is unknown"),
            std::string::npos);
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

}  // namespace
}  // namespace deinfer

// Sequences that take turns: who rests, and that nobody does without need.
#include <set>

#include "scheduler_fixture.h"

namespace deinfer {
namespace {

using namespace test;

constexpr int kSeats = 2;

SchedulerConfig two_seats(int num_blocks = 64) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = kSeats;
  config.num_blocks = num_blocks;
  config.enable_prefix_caching = false;
  return config;
}

Sequence expecting(SequenceId id, float length, int limit = 48) {
  Sequence sequence = distinct(id, 4, limit);
  sequence.expected_length = LengthDistribution::point(length);
  return sequence;
}

std::unique_ptr<SchedulingPolicy> longest_tail(bool take_turns = true) {
  return make_policy("longest_tail", {.tail_factor = 100.0, .take_turns = take_turns});
}

TEST(Turns, WhoeverMayHaveMostLeftHasASeat) {
  // The first in order keeps its seat; the others alternate as what they may have left shrinks.
  Scheduler scheduler(two_seats(), longest_tail());
  for (SequenceId id = 1; id <= 4; ++id) scheduler.add(expecting(id, 40.0f));
  std::set<SequenceId> started;
  for (int step = 0; step < 40; ++step) {
    const ScheduledBatch& batch = scheduler.schedule(step);
    EXPECT_LE(batch.items.size(), 2u);
    EXPECT_EQ(tokens_of(batch, 1) > 0, true) << "the first rests in step " << step;
    for (const SequenceId id : ids(batch)) started.insert(id);
    answer(scheduler, batch);
  }
  EXPECT_EQ(started, (std::set<SequenceId>{1, 2, 3, 4}));
  const SchedulerStats stats = scheduler.stats();
  EXPECT_EQ(stats.num_running, kSeats);
  EXPECT_EQ(stats.num_resting, 2);
  EXPECT_EQ(stats.num_preemptions, 0);
  int least = 48;
  int most = 0;
  for (SequenceId id = 2; id <= 4; ++id) {
    least = std::min(least, scheduler.find(id)->num_generated());
    most = std::max(most, scheduler.find(id)->num_generated());
  }
  EXPECT_LE(most - least, 16) << "equals advance together, a quantum or two apart";
}

TEST(Turns, NobodyRestsWhereTheWholeAnswersDoNotFit) {
  // Four answers of 40 + 4 tokens take 44 blocks of 4 tokens; two fit easily.
  Scheduler scheduler(two_seats(30), longest_tail());
  for (SequenceId id = 1; id <= 4; ++id) scheduler.add(expecting(id, 40.0f));
  for (int step = 0; step < 60; ++step) {
    answer(scheduler, scheduler.schedule(step));
    EXPECT_EQ(scheduler.stats().num_resting, 0);
  }
}

TEST(Turns, NobodyRestsOfWhomNothingIsExpectedNorWhenTurnsAreOff) {
  for (const bool known : {false, true}) {
    Scheduler scheduler(two_seats(), longest_tail(!known));
    for (SequenceId id = 1; id <= 4; ++id) {
      scheduler.add(known ? expecting(id, 40.0f) : distinct(id, 4, 48));
    }
    for (int step = 0; step < 60; ++step) {
      answer(scheduler, scheduler.schedule(step));
      EXPECT_EQ(scheduler.stats().num_resting, 0);
    }
  }
}

TEST(Turns, ABeliefThatChangesChangesTheTurn) {
  Scheduler scheduler(two_seats(), longest_tail());
  for (SequenceId id = 1; id <= 3; ++id) scheduler.add(expecting(id, 40.0f));
  answer(scheduler, scheduler.schedule(0));
  EXPECT_TRUE(scheduler.expect(2, LengthDistribution::point(9.0f)));
  const ScheduledBatch& batch = scheduler.schedule(1);
  EXPECT_EQ(ids(batch), (Ids{1, 3})) << "3 starts in the place of 2";
  answer(scheduler, batch);
}

TEST(Turns, AnAbortedRestingSequenceFreesItsBlocks) {
  Scheduler scheduler(two_seats(), longest_tail());
  for (SequenceId id = 1; id <= 3; ++id) scheduler.add(expecting(id, 40.0f));
  for (int step = 0; step < 20; ++step) answer(scheduler, scheduler.schedule(step));
  SequenceId resting = 0;
  for (SequenceId id = 1; id <= 3; ++id) {
    if (scheduler.find(id)->resting) resting = id;
  }
  ASSERT_NE(resting, 0u);
  EXPECT_TRUE(scheduler.abort(resting));
  scheduler.check_invariants();
  EXPECT_EQ(scheduler.stats().num_resting, 0);
  while (scheduler.has_unfinished()) answer(scheduler, scheduler.schedule(100));
  EXPECT_EQ(scheduler.stats().used_blocks, 0);
}

TEST(Turns, UpperRemainingCountsDeviationsOfSquareRoots) {
  const float lengths[] = {16.0f, 64.0f};
  const float chances[] = {0.5f, 0.5f};
  const LengthDistribution two(lengths, chances);
  EXPECT_FLOAT_EQ(two.upper_remaining(0, 0.0f), 36.0f) << "(4 + 8)^2 / 4";
  EXPECT_FLOAT_EQ(two.upper_remaining(0, 2.0f), 100.0f);
  EXPECT_FLOAT_EQ(two.upper_remaining(20, 2.0f), 44.0f) << "the shorter one is passed";
  EXPECT_EQ(two.upper_remaining(64, 2.0f), 0.0f);
  EXPECT_EQ(LengthDistribution().upper_remaining(0, 2.0f), 0.0f);
}

}  // namespace
}  // namespace deinfer

// The order in which each policy starts waiting sequences, and promotion.
#include <limits>

#include "scheduler_fixture.h"

namespace deinfer {
namespace {

using namespace test;

struct Spec {
  SequenceId id = 0;
  float expected = 0.0f;  // 0: unknown
  int priority = 0;
  std::int64_t arrival_us = 0;
};

/// The order in which sequences of one token each start on a single seat, one per step; the first
/// step is at `now_us`, the next ones a microsecond later each.
Ids order(const char* name, const std::vector<Spec>& specs, std::int64_t now_us = 0,
          Promotion promotion = {}, const PolicyConfig& policy = {}) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  config.promotion = promotion;
  Scheduler scheduler(config, make_policy(name, policy));
  for (const Spec& spec : specs) {
    Sequence sequence = distinct(spec.id, 4, 1000 / 4);
    sequence.max_new_tokens = 200;
    sequence.expected_length = LengthDistribution::point(spec.expected);
    sequence.priority = spec.priority;
    sequence.arrival_us = spec.arrival_us;
    scheduler.add(std::move(sequence));
  }
  Ids started;
  while (scheduler.has_unfinished()) {
    const ScheduledBatch& batch = scheduler.schedule(now_us++);
    started.push_back(batch.items.at(0).sequence->id);
    const SampledToken last[] = {{started.back(), 7, true}};
    scheduler.update(last);
  }
  return started;
}

const std::vector<Spec> kMixed = {{1, 90.0f}, {2, 20.0f}, {3, 60.0f}, {4, 22.0f}, {5, 150.0f, 1}};

TEST(Policies, OrderByTheirKeysAndPrioritiesFirst) {
  EXPECT_EQ(order("fcfs", kMixed), (Ids{5, 1, 2, 3, 4}));
  EXPECT_EQ(order("sjf", kMixed), (Ids{5, 2, 4, 3, 1}));
  EXPECT_EQ(order("length_bucket", kMixed), (Ids{5, 2, 4, 1, 3})) << "1 and 3 share (50, 100]";
  EXPECT_EQ(order("longest_tail", kMixed, 0, {}, {.tail_factor = 100.0}), (Ids{5, 1, 3, 4, 2}));
}

TEST(Policies, LengthBucketTakesEdges) {
  PolicyConfig config;
  config.bucket_edges = {21, 70};
  EXPECT_EQ(order("length_bucket", kMixed, 0, {}, config), (Ids{5, 2, 3, 4, 1}));
}

TEST(Policies, LongestTailIsFcfsWhileManyWait) {
  // Three or more waiting for one seat are many.
  EXPECT_EQ(order("longest_tail", {{1, 10.0f}, {2, 5.0f}, {3, 30.0f}, {4, 40.0f}}, 0, {},
                  {.tail_factor = 3.0}),
            (Ids{1, 2, 4, 3}));
}

TEST(Policies, HrrnWeighsWaitingByLength) {
  const std::vector<Spec> specs = {{1, 100.0f, 0, 0}, {2, 10.0f, 0, 900}, {3, 50.0f, 0, 400}};
  // Ratios at 1000: 10, 10, 12. Later ones grow as 1 / length.
  EXPECT_EQ(order("hrrn", specs, 1000), (Ids{3, 2, 1}));
  EXPECT_EQ(order("hrrn", specs, 905), (Ids{3, 1, 2})) << "2 has hardly waited";
}

TEST(Policies, UnknownLengthsTakeTheirTurnByArrival) {
  for (const char* name : {"fcfs", "hrrn", "length_bucket", "sjf"}) {
    EXPECT_EQ(order(name, {{1}, {2}, {3, 0.0f, 1}, {4}}), (Ids{3, 1, 2, 4})) << name;
  }
}

TEST(Policies, UnknownLengthsStandAtTheMeanOfEarlierAnswers) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  Scheduler scheduler(config, make_policy("sjf"));
  SequenceId id = 0;
  const auto step = [&](bool finish) {
    const ScheduledBatch& batch = scheduler.schedule(0);
    const SampledToken token[] = {{batch.items.at(0).sequence->id, 7, finish}};
    scheduler.update(token);
    return token[0].id;
  };
  for (int answer = 0; answer < 16; ++answer) {
    scheduler.add(distinct(++id, 2, 100));
    for (int i = 1; i <= 30; ++i) step(i == 30);
  }
  for (const float expected : {40.0f, 0.0f, 20.0f}) {
    Sequence sequence = distinct(++id, 2, 100);
    sequence.expected_length = LengthDistribution::point(expected);
    scheduler.add(std::move(sequence));
  }
  EXPECT_EQ(step(true), 19u);
  EXPECT_EQ(step(true), 18u) << "30 tokens";
  EXPECT_EQ(step(true), 17u);
}

TEST(Policies, ExpectReordersWhatWaitsButNoHint) {
  SchedulerConfig config = small_config();
  config.max_num_seqs = 1;
  Scheduler scheduler(config, make_policy("sjf"));
  for (SequenceId id = 1; id <= 3; ++id) {
    Sequence sequence = distinct(id, 4, 100);
    sequence.expected_length = LengthDistribution::point(10.0f * static_cast<float>(id));
    sequence.hinted = id == 2;
    scheduler.add(std::move(sequence));
  }
  EXPECT_TRUE(scheduler.expect(1, LengthDistribution::point(90.0f)));
  EXPECT_TRUE(scheduler.expect(2, LengthDistribution::point(99.0f)));
  EXPECT_FALSE(scheduler.expect(7, LengthDistribution::point(1.0f)));
  EXPECT_EQ(ids(scheduler.schedule(0)), (Ids{2}));
}

TEST(Promotion, AbsoluteWaitPutsTheLongestWaitingFirst) {
  const std::vector<Spec> specs = {{1, 90.0f, 0, 0}, {2, 20.0f, 0, 0}, {3, 10.0f, 0, 2'000'000}};
  EXPECT_EQ(order("sjf", specs, 3'000'000), (Ids{3, 2, 1}));
  for (const char* name : {"sjf", "length_bucket", "hrrn"}) {
    EXPECT_EQ(order(name, specs, 3'000'000, {.after_s = 2.0}), (Ids{1, 2, 3})) << name;
  }
}

TEST(Promotion, RelativeWaitCountsPerExpectedToken) {
  const std::vector<Spec> specs = {{1, 90.0f, 0, 0}, {2, 20.0f, 0, 0}, {3, 10.0f, 0, 2'900'000}};
  // 2 is due after 2 s and 1 after 9 s.
  EXPECT_EQ(order("sjf", specs, 3'000'000, {.per_token_s = 0.1}), (Ids{2, 3, 1}));
}

TEST(Promotion, NeverCrossesPriorities) {
  const std::vector<Spec> specs = {{1, 90.0f, 0, 0}, {2, 20.0f, 3, 5'000'000}};
  EXPECT_EQ(order("sjf", specs, 5'000'000, {.after_s = 1.0}), (Ids{2, 1}));
}

TEST(Promotion, HasADefaultForEachPolicy) {
  EXPECT_EQ(default_promotion("fcfs").after_s, 0.0);
  EXPECT_EQ(default_promotion("sjf").after_s, 60.0);
  EXPECT_NE(error_of([] { default_promotion("lifo"); }).find("\"lifo\""), std::string::npos);
}

TEST(Policies, RejectBadOptions) {
  const auto rejected = [](const PolicyConfig& config, const char* field) {
    const std::string error = error_of([&] { make_policy("length_bucket", config); });
    EXPECT_EQ(error.find(prefix(ErrorCode::kInvalidArgument) + field), 0u) << error;
  };
  rejected({.bucket_edges = {}, .bucket_width = 0}, "bucket_width");
  rejected({.bucket_edges = {10, 10}, .bucket_width = 50}, "bucket_edges");
  rejected({.tail_factor = std::numeric_limits<double>::quiet_NaN()}, "tail_factor");
}

}  // namespace
}  // namespace deinfer

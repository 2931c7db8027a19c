// Forecasts of KV use, what earlier answers say about lengths, and admission by both.
#include <algorithm>
#include <cmath>
#include <random>

#include "scheduler/accuracy_window.h"
#include "scheduler_fixture.h"

namespace deinfer {
namespace {

using namespace test;

TEST(KvForecast, IsTheMaximumOverAllSteps) {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 300; ++round) {
    const int size = 1 + below(20);
    const int shared_blocks = below(5);
    std::vector<KvForecast::Item> items(static_cast<std::size_t>(1 + below(12)));
    for (KvForecast::Item& item : items) item = {0, below(60), 1 + below(80), below(2)};
    std::int64_t expected = 0;
    for (int step = 0; step <= 60; ++step) {
      std::int64_t used = 0;
      bool any = false;
      for (const KvForecast::Item& item : items) {
        if (item.remaining < step) continue;
        any = true;
        used += (item.tokens + step + size - 1) / size - item.shared;
      }
      if (any) expected = std::max(expected, used + shared_blocks);
    }
    KvForecast forecast(size);
    forecast.set_shared_blocks(shared_blocks);
    for (std::size_t i = 0; i + 1 < items.size(); ++i) {
      if (i < 3) {
        forecast.add(items[i]);
        forecast.sort();
      } else {
        forecast.insert(items[i]);
      }
    }
    EXPECT_EQ(forecast.peak_with(items.back()), expected);
    forecast.insert(items.back());
    EXPECT_EQ(forecast.peak(), expected);
  }
  KvForecast none(4);
  none.set_shared_blocks(3);
  EXPECT_EQ(none.peak(), 0);
}

TEST(LengthHistory, ConditionsOnWhatIsGenerated) {
  LengthHistory history(100);
  for (int i = 1; i <= 15; ++i) history.add(10, true);
  history.refresh({});
  EXPECT_FALSE(history.known()) << "too few";
  EXPECT_EQ(history.mean(), 0.0f);
  for (int i = 0; i < 15; ++i) history.add(30, true);
  history.refresh({});
  ASSERT_TRUE(history.known());
  EXPECT_FLOAT_EQ(history.mean(), 20.0f);
  EXPECT_FLOAT_EQ(history.mean_remaining(10), 20.0f);
  EXPECT_FLOAT_EQ(history.mean_remaining(25), 5.0f);
  EXPECT_EQ(history.quantile_remaining(0.4, 0), 10.0f);
  EXPECT_EQ(history.quantile_remaining(0.6, 0), 30.0f);
  EXPECT_EQ(history.quantile_remaining(0.1, 12), 18.0f);
  EXPECT_GT(history.mean_remaining(30), 0.0f) << "beyond all that was seen";
}

TEST(LengthHistory, ForgetsWhatLeavesTheWindow) {
  LengthHistory history(20);
  for (int i = 0; i < 20; ++i) history.add(1000, true);
  for (int i = 0; i < 20; ++i) history.add(5 + i % 2, true);
  history.refresh({});
  EXPECT_FLOAT_EQ(history.mean(), 5.5f);
}

TEST(LengthHistory, CutAnswersAreAtLeastAsLong) {
  LengthHistory cut(100);
  LengthHistory all_ended(100);
  // Half of the answers are cut at 50, where the ended ones go on to 100.
  for (int i = 0; i < 20; ++i) {
    cut.add(50, false);
    cut.add(100, true);
    all_ended.add(50, true);
    all_ended.add(100, true);
  }
  cut.refresh({});
  all_ended.refresh({});
  EXPECT_FLOAT_EQ(all_ended.mean(), 75.0f);
  EXPECT_FLOAT_EQ(cut.mean(), 100.0f);
}

TEST(LengthHistory, RunningSequencesCountWhileTheWindowFills) {
  std::vector<Sequence> long_ones(64, distinct(1, 1, 1000));
  std::vector<Sequence*> running;
  for (Sequence& sequence : long_ones) {
    sequence.tokens.resize(200);
    running.push_back(&sequence);
  }
  LengthHistory history(100);
  for (int i = 0; i < 16; ++i) history.add(10, true);
  history.refresh(running);
  EXPECT_GT(history.mean(), 150.0f) << "the first to end are the short ones";
}

TEST(LengthHistory, StrataOfNeighboursCoverTheDistributionEvenly) {
  for (const SequenceId first : {0u, 1u, 12345u}) {
    std::vector<int> deciles(10);
    for (SequenceId id = first; id < first + 200; ++id) {
      ++deciles[static_cast<std::size_t>(LengthHistory::stratum(id) * 10)];
    }
    for (const int count : deciles) EXPECT_NEAR(count, 20, 2);
  }
}

SchedulerConfig tight_config(Admission admission) {
  SchedulerConfig config = small_config();
  config.block_size = 1;
  config.num_blocks = 100;
  config.max_num_batched_tokens = 60;
  config.admission = admission;
  config.enable_prefix_caching = false;
  return config;
}

/// How many of equal sequences (10 prompt tokens, 50 new ones at most) start in the first step.
std::size_t started(Admission admission, float expected, double safety = 0.0) {
  SchedulerConfig config = tight_config(admission);
  config.safety = safety;
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 8; ++id) {
    Sequence sequence = distinct(id, 10, 50);
    const float lengths[] = {expected, 50.0f};
    const float probabilities[] = {0.8f, 0.2f};
    if (expected > 0.0f && safety > 0.0) {
      sequence.expected_length = {lengths, probabilities};
    } else {
      sequence.expected_length = LengthDistribution::point(expected);
    }
    scheduler.add(std::move(sequence));
  }
  return scheduler.schedule(0).items.size();
}

TEST(AdmissionModes, EachReservesWhatItSays) {
  EXPECT_EQ(started(Admission::kPrompt, 40.0f), 6u) << "10 tokens each, 60 per step";
  EXPECT_EQ(started(Admission::kMaxTokens, 1.0f), 1u) << "60 blocks each of 100";
  EXPECT_EQ(started(Admission::kPeak, 0.0f), 6u) << "nothing is known: as by prompt";
  EXPECT_EQ(started(Admission::kPeak, 41.0f), 2u) << "50 blocks each: the last token has no KV";
  EXPECT_EQ(started(Admission::kPeak, 42.0f), 1u);
  EXPECT_EQ(started(Admission::kPeak, 11.0f), 5u) << "20 blocks each";
  EXPECT_EQ(started(Admission::kPeak, 11.0f, 1.0), 1u) << "its 90 % quantile is 50 tokens";
}

TEST(AdmissionModes, PeakUsesTheHistoryWhenNothingIsKnown) {
  Scheduler scheduler(tight_config(Admission::kPeak), make_policy("fcfs"));
  const auto serve = [&](SequenceId first, int count, int length) {
    for (SequenceId id = first; id < first + static_cast<SequenceId>(count); ++id) {
      scheduler.add(distinct(id, 2, 90));
    }
    while (scheduler.has_unfinished()) {
      std::vector<SampledToken> sampled;
      for (const ScheduledSequence& item : scheduler.schedule(0).items) {
        if (!item.samples) continue;
        sampled.push_back({item.sequence->id, 7, item.sequence->num_generated() + 1 == length});
      }
      scheduler.update(sampled);
    }
  };
  serve(1, 20, 29);
  for (SequenceId id = 101; id <= 108; ++id) scheduler.add(distinct(id, 2, 90));
  const ScheduledBatch& batch = scheduler.schedule(0);
  EXPECT_EQ(batch.items.size(), 3u) << "2 + 29 - 1 blocks each of 100";
  EXPECT_EQ(scheduler.stats().forecast_blocks, 90);
}

TEST(AdmissionModes, SharedBlocksCountOnce) {
  SchedulerConfig config = tight_config(Admission::kPeak);
  config.enable_prefix_caching = true;
  config.max_num_batched_tokens = 64;
  Scheduler scheduler(config, make_policy("fcfs"));
  for (SequenceId id = 1; id <= 4; ++id) {
    Sequence sample = make_sequence(id, 60, 30);
    sample.expected_length = LengthDistribution::point(9.0f);
    scheduler.add(std::move(sample));
  }
  EXPECT_EQ(scheduler.schedule(0).items.size(), 4u) << "59 shared + 4 x (1 + 8)";
}

TEST(AdmissionModes, AGraphsPaddedSeatNeedsNoWatermark) {
  for (const bool graphs : {false, true}) {
    SchedulerConfig config = tight_config(Admission::kPeak);
    config.watermark = 0.1;
    config.admission = Admission::kPeak;
    if (graphs) config.graph_sizes = {1, 2, 4};
    Scheduler scheduler(config, make_policy("fcfs"));
    for (SequenceId id = 1; id <= 6; ++id) {
      Sequence sequence = distinct(id, 6, 50);
      sequence.expected_length = LengthDistribution::point(20.0f);  // 25 blocks
      scheduler.add(std::move(sequence));
    }
    const ScheduledBatch& batch = scheduler.schedule(0);
    EXPECT_EQ(batch.items.size(), graphs ? 4u : 3u);
    EXPECT_EQ(batch.graph_size, graphs ? 4 : 0);
  }
}

TEST(AccuracyWindow, ReportsErrorsOrderAndCoverage) {
  AccuracyWindow window;
  EXPECT_EQ(window.report().count, 0);
  window.add(10.0f, 100.0f, 40);
  window.add(200.0f, 250.0f, 260);
  window.add(300.0f, 400.0f, 500);
  const LengthAccuracy all = window.report();
  EXPECT_EQ(all.count, 3);
  EXPECT_DOUBLE_EQ(all.mae, (30.0 + 60.0 + 200.0) / 3.0);
  EXPECT_DOUBLE_EQ(all.acc_50, 1.0 / 3.0);
  EXPECT_DOUBLE_EQ(all.acc_100, 2.0 / 3.0);
  EXPECT_DOUBLE_EQ(all.kendall_tau, 1.0);
  EXPECT_DOUBLE_EQ(all.q90_coverage, 1.0 / 3.0);
  for (int i = 0; i < 600; ++i) window.add(static_cast<float>(1000 - i), 2000.0f, i);
  EXPECT_EQ(window.report().count, 512);
  EXPECT_DOUBLE_EQ(window.report().kendall_tau, -1.0);
  EXPECT_DOUBLE_EQ(window.report().q90_coverage, 1.0);
}

}  // namespace
}  // namespace deinfer

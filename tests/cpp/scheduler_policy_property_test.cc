// What holds for every policy, admission and predictor, however wrong.
#include <cmath>
#include <limits>

#include "scheduler_simulation.h"

namespace deinfer {
namespace {

using namespace test;

constexpr const char* kPolicies[] = {"fcfs", "hrrn", "length_bucket", "longest_tail", "sjf"};
constexpr Admission kAdmissions[] = {Admission::kPeak, Admission::kPrompt, Admission::kMaxTokens};

/// Believes something about a job, possibly nonsense.
using Predictor = LengthDistribution (*)(const Job&);

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

LengthDistribution perfect(const Job& job) {
  return LengthDistribution::point(static_cast<float>(job.answer_length));
}
LengthDistribution unknown(const Job&) { return {}; }
LengthDistribution spread(const Job& job) {
  const auto real = static_cast<float>(job.answer_length);
  const float lengths[] = {0.5f * real, real, 2.0f * real};
  const float probabilities[] = {0.3f, 0.4f, 0.3f};
  return {lengths, probabilities};
}

const std::pair<const char*, Predictor> kPredictors[] = {
    {"unknown", unknown},
    {"perfect", perfect},
    {"spread", spread},
    {"constant", [](const Job&) { return LengthDistribution::point(7.0f); }},
    {"inverted",
     [](const Job& job) {
       return LengthDistribution::point(1000.0f / static_cast<float>(job.answer_length));
     }},
    {"zero", [](const Job&) { return LengthDistribution::point(0.0f); }},
    {"nan", [](const Job&) { return LengthDistribution::point(kNan); }},
    {"inf", [](const Job&) { return LengthDistribution::point(kInf); }},
    {"huge", [](const Job&) { return LengthDistribution::point(1e30f); }},
    {"sometimes", [](const Job& job) { return job.salt % 3 == 0 ? perfect(job) : unknown(job); }}};

std::string str(const char* policy, Admission admission, const char* belief, unsigned seed) {
  return std::string(policy) + ", admission " + std::to_string(static_cast<int>(admission)) + ", " +
         belief + ", seed " + std::to_string(seed);
}

Trace predicted_trace(unsigned seed, Predictor predictor) {
  Trace trace = random_trace(seed);
  for (Job& job : trace.jobs) job.sequence.expected_length = predictor(job);
  return trace;
}

TEST(PolicyProperties, NoPolicyAdmissionOrPredictorLosesOrChangesAnything) {
  std::int64_t preemptions = 0;
  std::int64_t promotions = 0;
  std::int64_t pauses = 0;
  std::int64_t rests = 0;
  unsigned seed = 10'000;
  for (const char* name : kPolicies) {
    for (const Admission admission : kAdmissions) {
      for (const auto& [belief, predictor] : kPredictors) {
        for (int round = 0; round < 4; ++round, ++seed) {
          SCOPED_TRACE(str(name, admission, belief, seed));
          Trace trace = predicted_trace(seed, predictor);
          trace.config.admission = admission;
          trace.config.safety = round == 0 ? 0.5 : 0.0;
          trace.config.history_window = 24;
          // Steps are microseconds.
          if (round == 1) trace.config.promotion.after_s = 20e-6;
          if (round == 2) trace.config.promotion.per_token_s = 1e-6;
          const Outcome outcome = play(trace, policy(name));
          if (HasFailure()) return;
          preemptions += outcome.stats.num_preemptions;
          promotions += outcome.stats.num_promotions;
          pauses += outcome.stats.paused_steps;
          rests += outcome.rests;
          if (admission == Admission::kMaxTokens) {
            EXPECT_EQ(outcome.stats.num_preemptions, 0);
          }
        }
      }
    }
  }
  // The traces do reach the paths that they are meant for.
  EXPECT_GT(preemptions, 500);
  EXPECT_GT(promotions, 500);
  EXPECT_GT(pauses, 100);
  EXPECT_GT(rests, 100);
}

TEST(PolicyProperties, WithoutPredictionsEveryPolicyIsFirstComeFirstServed) {
  for (unsigned seed = 20'000; seed < 20'060; ++seed) {
    SCOPED_TRACE(seed);
    const Trace trace = random_trace(seed);
    const Outcome expected = play(trace, policy("fcfs"));
    for (const char* name : kPolicies) {
      ASSERT_EQ(play(trace, policy(name)).batches, expected.batches) << name;
    }
  }
}

TEST(PolicyProperties, StaticBatchesLoseNothingHoweverTheyAreRecomputed) {
  std::int64_t set_aside = 0;
  unsigned seed = 50'000;
  for (const auto& [belief, predict] : kPredictors) {
    for (int round = 0; round < 20; ++round, ++seed) {
      SCOPED_TRACE(str("static_bucket", Admission::kPrompt, belief, seed));
      const Trace trace = predicted_trace(seed, predict);
      PolicyConfig config;
      config.static_batches.group = 1 + static_cast<int>(seed % 20);
      config.static_batches.batch_size = 1 + static_cast<int>(seed % 7);
      config.static_batches.bucket_tokens = static_cast<int>(seed % 3) * 5;
      config.static_batches.bucket_batch_sizes = {4, 3};
      config.static_batches.restart_failures = seed % 2 == 0;
      const char* name = seed % 5 == 0 ? "static" : "static_bucket";
      const Outcome outcome = play(trace, [&] { return make_policy(name, config); }, false, true);
      if (HasFailure()) return;
      set_aside += outcome.stats.set_aside;
    }
  }
  EXPECT_GT(set_aside, 100);
}

TEST(PolicyProperties, ALogReplaysToTheSameBatches) {
  unsigned seed = 30'000;
  for (const char* name : kPolicies) {
    for (int round = 0; round < 20; ++round, ++seed) {
      SCOPED_TRACE(str(name, Admission::kPeak, "spread", seed));
      Trace trace = predicted_trace(seed, spread);
      trace.config.promotion.after_s = 30e-6;
      const Outcome outcome = play(trace, policy(name));
      Scheduler again(trace.config, make_policy(name));
      std::vector<std::string> batches;
      outcome.log.replay(again, [&](const ScheduledBatch& batch) {
        if (!batch.items.empty()) batches.push_back(describe(batch));
      });
      ASSERT_EQ(batches, outcome.batches);
      EXPECT_EQ(again.stats().num_preemptions, outcome.stats.num_preemptions);
    }
  }
}

TEST(PolicyProperties, PerfectLengthsAndPeakAdmissionNeverPreempt) {
  std::int64_t steps = 0;
  std::int64_t eager = 0;  // preemptions where admission does not look ahead
  for (unsigned seed = 40'000; seed < 40'200; ++seed) {
    SCOPED_TRACE(seed);
    Trace trace = predicted_trace(seed, perfect);
    trace.config.max_num_batched_tokens = 2000;  // every prompt in one step
    trace.config.max_prefill_chunk = 0;
    trace.config.watermark = 0.0;
    const char* name = kPolicies[seed % std::size(kPolicies)];
    const Outcome outcome = play(trace, policy(name));
    EXPECT_EQ(outcome.stats.num_preemptions, 0) << name;
    EXPECT_EQ(outcome.stats.paused_steps, 0) << name;
    if (HasFailure()) return;
    steps += static_cast<std::int64_t>(outcome.batches.size());
    trace.config.admission = Admission::kPrompt;
    eager += play(trace, policy(name)).stats.num_preemptions;
  }
  EXPECT_GT(steps, 1000);
  EXPECT_GT(eager, 100) << "the traces are meant to fill the pool";
}

}  // namespace
}  // namespace deinfer

// Static batches: who runs with whom, what happens to sequences that outlive their bucket.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "scheduler/scheduler.h"

namespace deinfer {
namespace {

using Ids = std::vector<SequenceId>;

constexpr int kMaxNewTokens = 512;

/// The fake model: token i of a sequence's answer.
TokenId token_of(SequenceId id, int i) { return static_cast<TokenId>(id * 1000 + i); }

PolicyConfig options(const StaticBatchConfig& batches) {
  PolicyConfig config;
  config.static_batches = batches;
  return config;
}

struct Job {
  int answer = 1;    // tokens
  int expected = 0;  // 0: unknown
};

/// Sequences 1, 2, ... with prompts of 4 tokens, run step by step.
class Playback {
 public:
  Playback(const StaticBatchConfig& batches, const std::vector<Job>& jobs, int seats = 256,
           int num_blocks = 4096)
      : scheduler_(config(seats, num_blocks), make_policy("static_bucket", options(batches))) {
    for (const Job& job : jobs) add(job);
  }

  SequenceId add(const Job& job) {
    Sequence sequence;
    sequence.id = ++last_;
    sequence.arrival = last_;
    sequence.tokens.assign(4, static_cast<TokenId>(last_));
    sequence.prompt_length = 4;
    sequence.max_new_tokens = kMaxNewTokens;
    if (job.expected > 0) {
      sequence.expected_length = LengthDistribution::point(static_cast<float>(job.expected));
    }
    answers_[last_] = job.answer;
    scheduler_.add(std::move(sequence));
    return last_;
  }

  bool done() const { return !scheduler_.has_unfinished(); }
  Scheduler& scheduler() { return scheduler_; }

  /// Runs a step; the sequences in it, ascending.
  Ids step() {
    const ScheduledBatch& batch = scheduler_.schedule(0);
    Ids ids;
    std::vector<SampledToken> sampled;
    for (const ScheduledSequence& item : batch.items) {
      const Sequence& s = *item.sequence;
      ids.push_back(s.id);
      if (!item.samples) continue;
      const int i = s.num_generated();
      sampled.push_back({s.id, token_of(s.id, i), i + 1 == answers_.at(s.id)});
      if (!sampled.back().finished) continue;
      for (int k = 0; k < i; ++k) {
        EXPECT_EQ(s.tokens[static_cast<std::size_t>(4 + k)], token_of(s.id, k));
      }
      EXPECT_TRUE(ended_.insert(s.id).second);
    }
    for (const SequenceId id : batch.preempted) preempted_.push_back(id);
    scheduler_.update(sampled);
    scheduler_.check_invariants();
    std::ranges::sort(ids);
    return ids;
  }

  /// Runs to the end; the batches: sets of sequences that started together, with their steps.
  std::vector<std::pair<Ids, int>> batches() {
    std::vector<std::pair<Ids, int>> result;
    Ids before;
    while (!done()) {
      const Ids now = step();
      const bool goes_on = std::ranges::includes(before, now) && restarted() == seen_;
      seen_ = restarted();
      if (!goes_on || result.empty()) {
        result.emplace_back(now, 0);
      }
      ++result.back().second;
      before = now;
    }
    EXPECT_EQ(ended_.size(), answers_.size());
    return result;
  }

  const Ids& preempted() const { return preempted_; }
  std::size_t restarted() const { return preempted_.size(); }

 private:
  static SchedulerConfig config(int seats, int num_blocks) {
    SchedulerConfig config;
    config.max_num_seqs = seats;
    config.max_num_batched_tokens = 1 << 20;
    config.block_size = 4;
    config.num_blocks = num_blocks;
    config.enable_prefix_caching = false;
    config.admission = Admission::kPrompt;
    config.watermark = 0.01;
    return config;
  }

  Scheduler scheduler_;
  SequenceId last_ = 0;
  std::map<SequenceId, int> answers_;
  std::set<SequenceId> ended_;
  Ids preempted_;
  std::size_t seen_ = 0;
};

using Batches = std::vector<std::pair<Ids, int>>;

StaticBatchConfig sorted(int batch_size) {
  StaticBatchConfig config = StaticBatchConfig::plain(batch_size);
  config.sort = true;
  return config;
}

/// Buckets of 10 tokens in batches of 32, 16 and then 16.
StaticBatchConfig small_buckets() {
  StaticBatchConfig config;
  config.bucket_tokens = 10;
  config.bucket_batch_sizes = {32, 16};
  config.batch_size = 16;
  return config;
}

TEST(StaticBatches, PlainOnesRunInOrderOfArrivalUntilTheLastMemberEnds) {
  Playback run(StaticBatchConfig::plain(2), {{3}, {7}, {2}, {5}, {4}});
  EXPECT_EQ(run.batches(), (Batches{{{1, 2}, 7}, {{3, 4}, 5}, {{5}, 4}}));
}

TEST(StaticBatches, NothingJoinsARunningBatch) {
  Playback run(StaticBatchConfig::plain(4), {{3}, {6}});
  EXPECT_EQ(run.step(), (Ids{1, 2}));
  const SequenceId late = run.add({1});
  for (int i = 1; i < 6; ++i) {
    const Ids ids = run.step();
    EXPECT_EQ(std::ranges::count(ids, late), 0) << "step " << i;
  }
  EXPECT_EQ(run.step(), (Ids{late}));
  EXPECT_TRUE(run.done());
}

TEST(StaticBatches, PlainOnesIgnoreExpectations) {
  Playback run(StaticBatchConfig::plain(2), {{5, 5}, {1, 1}, {5, 5}, {1, 1}});
  EXPECT_EQ(run.batches(), (Batches{{{1, 2}, 5}, {{3, 4}, 5}}));
}

TEST(StaticBatches, GroupsAreSortedByExpectedLength) {
  StaticBatchConfig config = sorted(2);
  config.group = 4;
  // The fifth is the shortest, but belongs to the next group; the unknown is taken to be longest.
  Playback run(config, {{5, 5}, {3}, {6, 6}, {2, 2}, {1, 1}});
  EXPECT_EQ(run.batches(), (Batches{{{1, 4}, 5}, {{2, 3}, 6}, {{5}, 1}}));
}

TEST(StaticBatches, BucketsHaveTheirOwnBatchSizeAndRestsGoUpward) {
  std::vector<Job> jobs;
  for (int i = 0; i < 50; ++i) jobs.push_back({8, 10});   // bucket 0: 32, and 18 >= 32 / 2 left
  for (int i = 0; i < 20; ++i) jobs.push_back({18, 15});  // bucket 1: 16, and 4 < 16 left
  for (int i = 0; i < 3; ++i) jobs.push_back({40, 55});   // bucket 5: with those 4
  Playback run(small_buckets(), jobs);
  const Batches batches = run.batches();
  std::vector<std::pair<std::size_t, int>> shape;
  for (const auto& [ids, steps] : batches) shape.emplace_back(ids.size(), steps);
  EXPECT_EQ(shape, (std::vector<std::pair<std::size_t, int>>{{32, 8}, {18, 8}, {16, 18}, {7, 40}}));
  EXPECT_EQ(batches[3].first, (Ids{67, 68, 69, 70, 71, 72, 73}));
  EXPECT_TRUE(run.preempted().empty());
}

TEST(StaticBatches, ABatchIsNoLargerThanTheSeats) {
  Playback run(StaticBatchConfig::plain(16), {{3}, {4}, {5}, {6}, {7}}, 2);
  EXPECT_EQ(run.batches(), (Batches{{{1, 2}, 4}, {{3, 4}, 6}, {{5}, 7}}));
}

TEST(StaticBatches, FailuresAreRecomputedAtTheEndOfTheirGroupForTheRightPrompts) {
  std::vector<Job> jobs;
  for (int i = 0; i < 16; ++i) jobs.push_back({9, 10});
  for (int i = 0; i < 16; ++i) jobs.push_back({25, 30});
  jobs[3].answer = 12;  // beyond its bucket, 10
  jobs[20].answer = 35;
  jobs[7].answer = 10;                                 // just within
  for (int i = 0; i < 2; ++i) jobs.push_back({4, 4});  // another group
  StaticBatchConfig config = small_buckets();
  config.group = 32;
  for (const bool restart : {false, true}) {
    config.restart_failures = restart;
    Playback run(config, jobs);
    const Batches batches = run.batches();
    ASSERT_EQ(batches.size(), 4u);
    EXPECT_EQ(batches[0].second, 10) << "until the cap";
    EXPECT_EQ(batches[1].second, 30);
    EXPECT_EQ(batches[2], (std::pair<Ids, int>{{4, 21}, restart ? 35 : 5}))
        << (restart ? "all tokens again" : "12 - 10 and 35 - 30 tokens");
    EXPECT_EQ(batches[3], (std::pair<Ids, int>{{33, 34}, 4}));
    EXPECT_EQ(run.preempted(), (Ids{4, 21}));
    // Prompts and tokens before the cap: their last one was sampled, but never computed.
    EXPECT_EQ(run.scheduler().stats().recomputed_tokens, 4 + 9 + 4 + 29);
    EXPECT_EQ(run.scheduler().stats().generated_tokens, 14 * 9 + 12 + 10 + 15 * 25 + 35 + 2 * 4);
    EXPECT_EQ(run.scheduler().stats().set_aside, 2);
  }
}

TEST(StaticBatches, WithoutBucketsTheBoundIsTheLongestExpectationOfABatch) {
  StaticBatchConfig config = sorted(2);
  config.collect_failures = true;
  Playback run(config, {{6, 5}, {6, 6}, {9, 8}, {8, 7}});
  EXPECT_EQ(run.batches(), (Batches{{{1, 2}, 6}, {{3, 4}, 8}, {{3}, 1}}));
}

TEST(StaticBatches, RecomputedOnesHaveNoBound) {
  StaticBatchConfig config = sorted(2);
  config.collect_failures = true;
  Playback run(config, {{400, 1}, {1, 1}});
  EXPECT_EQ(run.batches(), (Batches{{{1, 2}, 1}, {{1}, 399}}));
  EXPECT_EQ(run.preempted(), Ids{1});
}

TEST(StaticBatches, WhatTheCacheCannotHoldMakesABatchOfItsOwn) {
  // 140 blocks, two of them left as watermark; a prompt takes one.
  std::vector<Job> jobs(150, {1});
  jobs[0].answer = 4;
  Playback run(StaticBatchConfig::plain(150), jobs, 256, 140);
  const Batches batches = run.batches();
  ASSERT_EQ(batches.size(), 2u);
  EXPECT_EQ(batches[0].first.size(), 138u);
  EXPECT_EQ(batches[0].second, 4) << "nobody joins once members have ended";
  EXPECT_EQ(batches[1].first.size(), 12u);
}

TEST(StaticBatches, AbortedAndReconsideredMembersAreForgottenEverywhere) {
  StaticBatchConfig config = sorted(2);
  config.collect_failures = true;
  Playback run(config, {{9, 1}, {9, 1}, {3, 5}, {3, 5}, {3, 5}, {3, 5}});
  EXPECT_EQ(run.step(), (Ids{1, 2}));     // both fail
  EXPECT_TRUE(run.scheduler().abort(3));  // planned
  EXPECT_TRUE(run.scheduler().expect(4, LengthDistribution::point(2)));
  EXPECT_EQ(run.step(), (Ids{5, 6}));
  EXPECT_TRUE(run.scheduler().abort(1));  // failed
  EXPECT_TRUE(run.scheduler().expect(2, LengthDistribution()));
  EXPECT_EQ(run.scheduler().stats().num_waiting, 2);
  while (run.scheduler().find(5) != nullptr) run.step();
  EXPECT_EQ(run.step(), Ids{2}) << "the failure comes before the next group";
  while (run.scheduler().find(2) != nullptr) run.step();
  EXPECT_EQ(run.step(), Ids{4});
}

TEST(StaticBatches, TheOtherNameIsPlain) {
  PolicyConfig config;
  config.static_batches.batch_size = 3;
  const std::unique_ptr<SchedulingPolicy> policy = make_policy("static", config);
  std::vector<Sequence> sequences(4);
  for (Sequence& sequence : sequences) {
    sequence.id = sequence.arrival = static_cast<SequenceId>(&sequence - sequences.data());
    sequence.expected_length = LengthDistribution::point(10.0f - static_cast<float>(sequence.id));
    policy->push(sequence);
  }
  std::vector<Sequence*> running;
  while (Sequence* next = policy->next({.running = running, .max_num_seqs = 8})) {
    EXPECT_EQ(next->id, running.size());
    policy->remove(*next);
    running.push_back(next);
  }
  EXPECT_EQ(running.size(), 3u);
  EXPECT_EQ(policy->set_aside({.running = running, .max_num_seqs = 8}), nullptr);
}

TEST(StaticBatches, BadConfigurationsAreRefused) {
  const auto message = [](auto&& change) {
    StaticBatchConfig config;
    change(config);
    try {
      make_policy("static_bucket", options(config));
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(message([](auto& c) { c.group = 0; }).find("group"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.batch_size = -3; }).find("-3"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.bucket_tokens = -1; }).find("-1"), std::string::npos);
  EXPECT_NE(message([](auto& c) { c.bucket_batch_sizes = {4, 0}; }).find("0"), std::string::npos);
  EXPECT_EQ(message([](auto&) {}), "");
}

}  // namespace
}  // namespace deinfer

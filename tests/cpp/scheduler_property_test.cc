// What holds for any trace, under first come first served and under a policy that answers at
// random.
#include "scheduler_simulation.h"

namespace deinfer {
namespace {

using namespace test;

/// Answers at random (from its own seed): no policy may break anything but the waiting times.
class RandomPolicy final : public SchedulingPolicy {
 public:
  RandomPolicy(unsigned seed, bool sets_aside) : random_(seed), sets_aside_(sets_aside) {}
  void push(Sequence& sequence) override { waiting_.push_back(&sequence); }
  void remove(Sequence& sequence) override { std::erase(waiting_, &sequence); }
  std::size_t size() const override { return waiting_.size(); }
  Sequence* next(const SchedulingContext& context) override {
    if (!context.running.empty() && random_.chance(20)) return nullptr;
    return waiting_.empty() ? nullptr : pick(waiting_);
  }
  Sequence* victim(const SchedulingContext& context) override { return pick(context.running); }
  Sequence* set_aside(const SchedulingContext& context) override {
    const bool sets_aside = sets_aside_ && !context.running.empty() && random_.chance(1);
    return sets_aside ? pick(context.running) : nullptr;
  }

 private:
  Sequence* pick(std::span<Sequence* const> from) {
    return from[static_cast<std::size_t>(random_.between(0, static_cast<int>(from.size()) - 1))];
  }

  Random random_;
  const bool sets_aside_;
  std::vector<Sequence*> waiting_;
};

constexpr unsigned kTraces = 300;

TEST(SchedulerProperties, EverySequenceEndsOnceWithItsOwnTokens) {
  SchedulerStats sum;
  int aborted = 0;
  int rejected = 0;
  for (unsigned seed = 0; seed < kTraces; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Outcome outcome = play(random_trace(seed), policy("fcfs"));
    if (HasFailure()) return;
    sum.num_preemptions += outcome.stats.num_preemptions;
    sum.recomputed_tokens += outcome.stats.recomputed_tokens;
    sum.prefix_hit_tokens += outcome.stats.prefix_hit_tokens;
    for (const Job& job : outcome.jobs) {
      aborted += job.aborted ? 1 : 0;
      rejected += job.rejected ? 1 : 0;
    }
  }
  // The traces do reach the paths that they are meant for.
  EXPECT_GT(sum.num_preemptions, 500);
  EXPECT_GT(sum.recomputed_tokens, 5000);
  EXPECT_GT(sum.prefix_hit_tokens, 5000);
  EXPECT_GT(aborted, 100);
  EXPECT_GT(rejected, 50);
}

TEST(SchedulerProperties, TheSameTraceGivesTheSameBatches) {
  for (unsigned seed = 1000; seed < 1000 + kTraces / 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Trace trace = random_trace(seed);
    ASSERT_EQ(play(trace, policy("fcfs")).batches, play(trace, policy("fcfs")).batches);
  }
}

TEST(SchedulerProperties, NoPolicyCanChangeATokenOrLoseASequence) {
  for (unsigned seed = 2000; seed < 2000 + kTraces; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const bool sets_aside = seed % 2 == 0;
    const auto random_policy = [&] { return std::make_unique<RandomPolicy>(seed, sets_aside); };
    play(random_trace(seed), random_policy, true, sets_aside);
    if (HasFailure()) return;
  }
}

TEST(SchedulerProperties, FcfsStartsInOrder) {
  for (unsigned seed = 3000; seed < 3000 + kTraces / 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Trace trace = random_trace(seed);
    for (Job& job : trace.jobs) {
      job.sequence.priority = 0;
      job.submit_step = 0;
      job.abort_step = -1;
    }
    Scheduler scheduler(trace.config, make_policy("fcfs"));
    std::map<SequenceId, const Job*> jobs;
    for (const Job& job : trace.jobs) {
      jobs[job.sequence.id] = &job;
      try {
        scheduler.add(job.sequence);
      } catch (const Error&) {
        continue;
      }
    }
    SequenceId last_started = 0;
    while (scheduler.has_unfinished()) {
      std::vector<SampledToken> sampled;
      for (const ScheduledSequence& item : scheduler.schedule(0).items) {
        const Sequence& s = *item.sequence;
        if (s.preemptions == 0 && s.num_generated() == 0 && s.id > last_started) {
          last_started = s.id;
        }
        ASSERT_LE(s.id, last_started);
        if (!item.samples) continue;
        const bool last = s.num_generated() + 1 == jobs.at(s.id)->answer_length;
        sampled.push_back({s.id, 1, last});
      }
      // Nobody waits who came before one that has started, except after a preemption.
      for (const auto& [id, job] : jobs) {
        const Sequence* s = scheduler.find(id);
        if (s != nullptr && id < last_started && s->state == SequenceState::kWaiting) {
          ASSERT_GT(s->preemptions, 0);
        }
      }
      scheduler.update(sampled);
    }
  }
}

/// Overload: many long answers in a small pool.
TEST(SchedulerProperties, RecomputationStaysSmallUnderOverload) {
  Trace trace;
  trace.config.max_num_seqs = 32;
  trace.config.max_num_batched_tokens = 128;
  trace.config.block_size = 4;
  trace.config.num_blocks = 200;
  trace.config.enable_prefix_caching = false;
  trace.config.admission = Admission::kPrompt;
  std::int64_t work = 0;
  for (SequenceId id = 1; id <= 100; ++id) {
    Job job;
    job.sequence.id = id;
    job.sequence.arrival = id;
    job.sequence.tokens.assign(10, static_cast<TokenId>(id % kVocabulary));
    job.sequence.prompt_length = 10;
    job.sequence.max_new_tokens = 100;
    job.salt = id;
    job.answer_length = 20 + static_cast<int>(id * 37 % 80);
    work += 10 + job.answer_length;
    trace.jobs.push_back(job);
  }
  const Outcome outcome = play(trace, policy("fcfs"));
  EXPECT_GT(outcome.stats.num_preemptions, 10);
  EXPECT_LT(outcome.stats.num_preemptions, 200);
  EXPECT_LT(outcome.stats.recomputed_tokens, work / 2);
}

}  // namespace
}  // namespace deinfer

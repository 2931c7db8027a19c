// Random traces through the scheduler with a simulated KV cache and a deterministic fake model.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "deinfer/error.h"
#include "scheduler/event_log.h"
#include "scheduler/scheduler.h"

namespace deinfer::test {

constexpr TokenId kVocabulary = 50;

/// What the KV of a position depends on: the whole prefix up to it.
inline std::uint64_t extend(std::uint64_t prefix, TokenId token) {
  std::uint64_t h = (prefix ^ static_cast<std::uint32_t>(token + 1)) * 0xbf58476d1ce4e5b9u;
  return h ^ (h >> 29);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int between(int low, int high) {  // inclusive; the same on every platform
    return low + static_cast<int>(engine_() % static_cast<unsigned>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }

 private:
  std::mt19937 engine_;
};

using PolicyMaker = std::function<std::unique_ptr<SchedulingPolicy>()>;

inline PolicyMaker policy(std::string name, PolicyConfig config = {}) {
  return [name = std::move(name), config] { return make_policy(name, config); };
}

/// One request sample of a trace and what became of it.
struct Job {
  Sequence sequence;
  std::uint64_t salt = 0;  // the sampler's seed
  int answer_length = 0;
  int submit_step = 0;
  int abort_step = -1;  // before this step, if it still exists
  bool rejected = false;
  bool aborted = false;
  int endings = 0;
  std::vector<TokenId> tokens;  // at the end
};

struct Trace {
  SchedulerConfig config;
  std::vector<Job> jobs;
};

/// The fake model: the next token from the KV of the last position.
inline TokenId next_token(std::uint64_t prefix, std::uint64_t salt) {
  return static_cast<TokenId>((prefix ^ salt) % kVocabulary);
}

inline Trace random_trace(unsigned seed) {
  Random random(seed);
  Trace trace;
  SchedulerConfig& config = trace.config;
  config.max_num_seqs = random.between(1, 12);
  config.max_num_batched_tokens = random.chance(30) ? random.between(1, 8) : random.between(8, 80);
  config.block_size = random.between(1, 8);
  config.num_blocks = random.between(4, 60);
  config.max_prefill_chunk = random.chance(50) ? 0 : random.between(1, 20);
  config.enable_prefix_caching = random.chance(70);
  config.watermark = random.chance(50) ? 0.01 : 0.0;
  config.max_pause = random.chance(50) ? 0 : random.between(1, 5);
  config.preempt_limit = random.between(0, 3);

  std::vector<std::vector<TokenId>> stems(3);  // shared beginnings of prompts
  for (auto& stem : stems) {
    stem.resize(static_cast<std::size_t>(random.between(1, 40)));
    for (TokenId& token : stem) token = random.between(0, 1);
  }
  const int capacity = config.num_blocks * config.block_size;
  const int requests = random.between(5, 40);
  SequenceId id = 0;
  for (int request = 0; request < requests; ++request) {
    Job job;
    const auto& stem = stems[static_cast<std::size_t>(random.between(0, 2))];
    auto& tokens = job.sequence.tokens;
    tokens.assign(stem.begin(), stem.begin() + random.between(0, static_cast<int>(stem.size())));
    const int own = random.between(tokens.empty() ? 1 : 0, 10);
    for (int i = 0; i < own; ++i) tokens.push_back(random.between(0, 1));
    job.sequence.prompt_length = static_cast<int>(tokens.size());
    job.sequence.arrival = static_cast<std::uint64_t>(request);
    job.sequence.priority = random.chance(20) ? random.between(-1, 2) : 0;
    job.sequence.reuse_prefix = !random.chance(10);
    // Often near the size of the pool, now and then beyond it.
    job.sequence.max_new_tokens =
        random.chance(5) ? capacity : random.between(1, std::max(1, capacity / 2));
    job.submit_step = random.chance(50) ? 0 : random.between(0, 60);
    job.sequence.arrival_us = job.submit_step;
    const int samples = random.chance(30) ? random.between(2, 4) : 1;
    for (int sample = 0; sample < samples; ++sample) {
      job.sequence.id = ++id;
      job.salt = id * 0x9e3779b97f4a7c15u;
      job.answer_length = random.between(1, job.sequence.max_new_tokens);
      job.abort_step = random.chance(10) ? job.submit_step + random.between(0, 50) : -1;
      trace.jobs.push_back(job);
    }
  }
  return trace;
}

/// The prompt and answer of a job that runs to its end, without a scheduler.
inline std::vector<TokenId> reference_tokens(const Job& job) {
  std::vector<TokenId> tokens = job.sequence.tokens;
  std::uint64_t prefix = 0;
  for (const TokenId token : tokens) prefix = extend(prefix, token);
  for (int i = 0; i < job.answer_length; ++i) {
    tokens.push_back(next_token(prefix, job.salt));
    prefix = extend(prefix, tokens.back());
  }
  return tokens;
}

struct Outcome {
  std::vector<Job> jobs;
  std::vector<std::string> batches;  // one line per step
  SchedulerStats stats;
  EventLog log;
  int rests = 0;       // steps of sequences that gave up their seat
  bool ended = false;  // within the bound on steps
};

/// Everything that a batch says, with its blocks.
inline std::string describe(const ScheduledBatch& batch) {
  std::string line;
  for (const ScheduledSequence& item : batch.items) {
    line += std::to_string(item.sequence->id) + ":" + std::to_string(item.num_tokens) + "[";
    for (const std::int32_t block : item.sequence->block_table) line += std::to_string(block) + " ";
    line += "]";
  }
  for (const SequenceId id : batch.preempted) line += " -" + std::to_string(id);
  return line;
}

/// Plays a trace and checks everything that must hold in every step.
class Simulation {
 public:
  Simulation(const Trace& trace, const PolicyMaker& make, bool policy_is_random,
             bool policy_sets_aside)
      : config_(trace.config),
        scheduler_(trace.config, make()),
        policy_is_random_(policy_is_random),
        policy_sets_aside_(policy_sets_aside),
        kv_(static_cast<std::size_t>(config_.num_blocks * config_.block_size)) {
    outcome_.jobs = trace.jobs;
    scheduler_.record(&outcome_.log);
    for (Job& job : outcome_.jobs) jobs_[job.sequence.id] = &job;
  }

  Outcome run() {
    int last_submit = 0;
    std::int64_t work = 0;
    for (const Job& job : outcome_.jobs) {
      last_submit = std::max(last_submit, job.submit_step);
      work += job.sequence.length() + job.answer_length;
    }
    const std::int64_t bound = last_submit + 20 * work + 1000;
    for (int step = 0; step < bound && !outcome_.ended; ++step) {
      submit_and_abort(step);
      if (scheduler_.has_unfinished()) {
        run_step(step);
      } else {
        EXPECT_TRUE(scheduler_.schedule(step).items.empty());
        outcome_.ended = step >= last_submit;
      }
      if (::testing::Test::HasFailure()) break;
    }
    outcome_.stats = scheduler_.stats();
    return std::move(outcome_);
  }

 private:
  void submit_and_abort(int step) {
    for (Job& job : outcome_.jobs) {
      if (job.submit_step == step) {
        try {
          scheduler_.add(job.sequence);
        } catch (const Error& e) {
          EXPECT_EQ(e.code(), ErrorCode::kOutOfMemory) << e.what();
          job.rejected = true;
          ++job.endings;
        }
      }
      if (job.abort_step == step && scheduler_.abort(job.sequence.id)) {
        job.aborted = true;
        ++job.endings;
      }
    }
  }

  void run_step(int step) {
    std::vector<const Sequence*> running;
    for (const auto& [id, job] : jobs_) {
      const Sequence* s = scheduler_.find(id);
      if (s != nullptr && s->state == SequenceState::kRunning) running.push_back(s);
    }
    was_running_.clear();
    for (const Sequence* s : running) was_running_.insert(s->id);
    std::vector<const Sequence*> decodes;
    std::vector<const Sequence*> prefills;
    for (const Sequence* s : running) {
      (s->num_pending() == 1 ? decodes : prefills).push_back(s);
    }

    const ScheduledBatch& batch = scheduler_.schedule(step);
    const auto preempted = [&](const Sequence* s) {
      return std::ranges::count(batch.preempted, s->id) == 1;
    };
    check_batch(batch);
    for (const Sequence* s : decodes) {
      EXPECT_TRUE(part_.contains(s->id) || preempted(s) || s->pause > 0 || s->resting)
          << "decode " << s->id << " starves";
      EXPECT_LE(s->pause, config_.max_pause);
    }
    check_promotions();
    std::erase_if(prefills, preempted);
    const auto planned = [&](const Sequence* s) { return part_.contains(s->id); };
    const auto paused = [](const Sequence* s) { return s->pause > 0 || s->resting; };
    EXPECT_TRUE(prefills.empty() || std::ranges::any_of(prefills, planned) ||
                std::ranges::any_of(prefills, paused))
        << "prefills starve";
    // After the step's promotions.
    const auto by_order = [](const Sequence* a, const Sequence* b) { return runs_before(*a, *b); };
    const Sequence* first =
        running.empty() ? nullptr : *std::ranges::min_element(running, by_order);
    for (const Sequence* s : running) {
      if (!s->resting) continue;
      ++outcome_.rests;
      EXPECT_NE(s, first) << "first in order";
      EXPECT_TRUE(s->expected_length.known()) << "nothing is expected of " << s->id;
      EXPECT_FALSE(part_.contains(s->id));
    }
    if (first != nullptr && !policy_sets_aside_) {
      EXPECT_FALSE(preempted(first)) << "first in order: " << first->id;
    }
    write_and_read_kv(batch);
    record(batch);
    answer(batch);
    scheduler_.check_invariants();
    const SchedulerStats stats = scheduler_.stats();
    EXPECT_EQ(stats.used_blocks + stats.free_blocks + stats.cached_blocks, config_.num_blocks);
  }

  /// Whoever starts goes before nobody who was promoted and waits, and nobody is evicted too often.
  void check_promotions() {
    std::vector<const Sequence*> started;
    std::vector<const Sequence*> overdue;
    for (const auto& [id, job] : jobs_) {
      const Sequence* s = scheduler_.find(id);
      if (s == nullptr) continue;
      if (config_.preempt_limit > 0) {
        EXPECT_LE(s->evictions, config_.preempt_limit) << "sequence " << id;
      }
      if (s->state == SequenceState::kRunning && !was_running_.contains(id)) started.push_back(s);
      if (s->state == SequenceState::kWaiting && s->promoted) overdue.push_back(s);
    }
    if (policy_is_random_) return;
    for (const Sequence* s : started) {
      for (const Sequence* t : overdue) {
        EXPECT_FALSE(s->priority == t->priority && runs_before(*t, *s))
            << s->id << " starts before the promoted " << t->id;
      }
    }
  }

  void check_batch(const ScheduledBatch& batch) {
    part_.clear();
    int num_tokens = 0;
    ASSERT_FALSE(batch.items.empty()) << "no progress";
    for (const ScheduledSequence& item : batch.items) {
      const Sequence& s = *item.sequence;
      EXPECT_TRUE(part_.insert(s.id).second) << "scheduled twice";
      EXPECT_EQ(s.state, SequenceState::kRunning);
      EXPECT_GE(item.num_tokens, 1);
      EXPECT_LE(item.num_tokens, s.num_pending());
      EXPECT_EQ(item.samples, item.num_tokens == s.num_pending());
      if (config_.max_prefill_chunk > 0) {
        EXPECT_LE(item.num_tokens, config_.max_prefill_chunk);
      }
      EXPECT_GE(static_cast<int>(s.block_table.size()) * config_.block_size,
                s.num_computed + item.num_tokens);
      num_tokens += item.num_tokens;
    }
    EXPECT_EQ(batch.num_tokens, num_tokens);
    EXPECT_LE(num_tokens, config_.max_num_batched_tokens);
    EXPECT_LE(static_cast<int>(batch.items.size()), config_.max_num_seqs);
    EXPECT_LE(scheduler_.stats().num_running, config_.max_num_seqs);
    if (!policy_sets_aside_) {
      for (const SequenceId id : batch.preempted) EXPECT_FALSE(part_.contains(id));
      for (const ScheduledSequence& item : batch.items) {
        EXPECT_TRUE(batch.preempted.empty() || was_running_.contains(item.sequence->id))
            << "admitted in place of a preempted one";
      }
    }
  }

  std::uint64_t& slot(const Sequence& s, int position) {
    const std::int32_t block =
        s.block_table[static_cast<std::size_t>(position / config_.block_size)];
    return kv_[static_cast<std::size_t>(block * config_.block_size +
                                        position % config_.block_size)];
  }

  /// Writes all of the step's KV first and then attends, as the runtime does in every layer.
  void write_and_read_kv(const ScheduledBatch& batch) {
    std::set<const std::uint64_t*> written;
    std::vector<std::vector<std::uint64_t>> prefixes;
    for (const ScheduledSequence& item : batch.items) {
      const Sequence& s = *item.sequence;
      std::vector<std::uint64_t>& prefix = prefixes.emplace_back();
      for (int i = 0; i < s.num_computed + item.num_tokens; ++i) {
        const TokenId token = s.tokens[static_cast<std::size_t>(i)];
        prefix.push_back(extend(i == 0 ? 0 : prefix.back(), token));
        if (i < s.num_computed) continue;
        slot(s, i) = prefix.back();
        EXPECT_TRUE(written.insert(&slot(s, i)).second) << "two writers of one KV slot";
      }
    }
    for (std::size_t k = 0; k < prefixes.size(); ++k) {
      const Sequence& s = *batch.items[k].sequence;
      for (std::size_t i = 0; i < prefixes[k].size(); ++i) {
        ASSERT_EQ(slot(s, static_cast<int>(i)), prefixes[k][i])
            << "sequence " << s.id << " reads foreign KV at position " << i;
      }
    }
  }

  void record(const ScheduledBatch& batch) { outcome_.batches.push_back(describe(batch)); }

  void answer(const ScheduledBatch& batch) {
    std::vector<SampledToken> sampled;
    std::vector<const Sequence*> finished;
    for (const ScheduledSequence& item : batch.items) {
      if (!item.samples) continue;
      const Sequence& s = *item.sequence;
      const Job& job = *jobs_.at(s.id);
      const bool last = s.num_generated() + 1 == job.answer_length;
      sampled.push_back({s.id, next_token(slot(s, s.length() - 1), job.salt), last});
      if (last) finished.push_back(&s);
    }
    scheduler_.update(sampled);
    for (const Sequence* s : finished) {
      EXPECT_EQ(s->state, SequenceState::kFinished);
      Job& job = *jobs_.at(s->id);
      job.tokens = s->tokens;
      ++job.endings;
    }
  }

  const SchedulerConfig config_;
  Scheduler scheduler_;
  const bool policy_is_random_;
  const bool policy_sets_aside_;
  std::vector<std::uint64_t> kv_;  // [num_blocks, block_size]
  std::map<SequenceId, Job*> jobs_;
  std::set<SequenceId> was_running_;  // before the current batch
  std::set<SequenceId> part_;         // of the current batch
  Outcome outcome_;
};

/// Runs a trace and checks what must hold at its end.
inline Outcome play(const Trace& trace, const PolicyMaker& make, bool policy_is_random = false,
                    bool policy_sets_aside = false) {
  Outcome outcome = Simulation(trace, make, policy_is_random, policy_sets_aside).run();
  EXPECT_TRUE(outcome.ended) << "livelock";
  for (const Job& job : outcome.jobs) {
    EXPECT_EQ(job.endings, 1) << "sequence " << job.sequence.id;
    if (!job.rejected && !job.aborted) {
      EXPECT_EQ(job.tokens, reference_tokens(job)) << "sequence " << job.sequence.id;
    }
  }
  EXPECT_EQ(outcome.stats.used_blocks, 0);
  EXPECT_EQ(outcome.stats.num_waiting + outcome.stats.num_running, 0);
  return outcome;
}

}  // namespace deinfer::test

// The real scheduler in front of a model that only takes time: a step costs
// a + b * sequences + c * KV tokens read + p * prefilled tokens, in milliseconds.
#include <unistd.h>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "bench.h"
#include "scheduler/scheduler.h"

namespace deinfer::bench {
namespace {

using Json = nlohmann::json;

struct StepCost {  // milliseconds
  double a = 0.0;
  double b = 0.0;
  double c = 0.0;
  double p = 0.0;
};

/// Reads an object's members; one that nobody asked for is an error.
class Settings {
 public:
  explicit Settings(const Json& json) : json_(json) {}

  template <typename Value>
  void read(const char* key, Value& value) {
    known_.emplace_back(key);
    if (json_.contains(key)) value = json_.at(key).get<Value>();
  }
  const Json* object(const char* key) {
    known_.emplace_back(key);
    return json_.contains(key) ? &json_.at(key) : nullptr;
  }
  void finish() const {
    for (const auto& [key, value] : json_.items()) {
      check_argument(std::ranges::find(known_, key) != known_.end(), "simulation: unknown setting ",
                     key);
    }
  }

 private:
  const Json& json_;
  std::vector<std::string> known_;
};

StaticBatchConfig static_config(const Json& json) {
  StaticBatchConfig config;
  Settings settings(json);
  settings.read("group", config.group);
  settings.read("batch_size", config.batch_size);
  settings.read("sort", config.sort);
  settings.read("bucket_tokens", config.bucket_tokens);
  settings.read("bucket_batch_sizes", config.bucket_batch_sizes);
  settings.read("collect_failures", config.collect_failures);
  settings.read("restart_failures", config.restart_failures);
  settings.finish();
  return config;
}

struct SimulationConfig {
  explicit SimulationConfig(const Json& json) {
    Settings settings(json);
    settings.read("policy", policy);
    settings.read("max_num_seqs", scheduler.max_num_seqs);
    settings.read("max_num_batched_tokens", scheduler.max_num_batched_tokens);
    settings.read("block_size", scheduler.block_size);
    settings.read("num_blocks", scheduler.num_blocks);
    settings.read("watermark", scheduler.watermark);
    settings.read("safety", scheduler.safety);
    settings.read("history_window", scheduler.history_window);
    settings.read("max_pause", scheduler.max_pause);
    settings.read("readmission_steps", scheduler.readmission_steps);
    settings.read("preempt_limit", scheduler.preempt_limit);
    std::string admission = "peak";
    settings.read("admission", admission);
    scheduler.admission = parse_admission(admission);
    scheduler.promotion = default_promotion(policy);
    settings.read("promote_after_s", scheduler.promotion.after_s);
    settings.read("promote_per_token_s", scheduler.promotion.per_token_s);
    settings.read("bucket_width", options.bucket_width);
    settings.read("tail_factor", options.tail_factor);
    settings.read("take_turns", options.take_turns);
    settings.read("max_tokens", max_tokens);
    settings.read("padded", padded);
    scheduler.enable_prefix_caching = false;
    if (const Json* json_cost = settings.object("cost")) {
      Settings members(*json_cost);
      members.read("a", cost.a);
      members.read("b", cost.b);
      members.read("c", cost.c);
      members.read("p", cost.p);
      members.finish();
    }
    if (const Json* json_static = settings.object("static")) {
      options.static_batches = static_config(*json_static);
    }
    settings.finish();
  }

  std::unique_ptr<SchedulingPolicy> make() const { return make_policy(policy, options); }

  std::string policy = "fcfs";
  PolicyConfig options;
  SchedulerConfig scheduler;
  int max_tokens = 512;
  StepCost cost;
  bool padded = false;  // of batches, all rows run until the last one ends
};

/// Durations of calls, to 0.1 us below 1 ms, in constant memory.
class DurationHistogram {
 public:
  template <typename Call>
  decltype(auto) time(Call&& call) {
    const auto begin = std::chrono::steady_clock::now();
    decltype(auto) result = call();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    sum_us_ += took.count();
    max_us_ = std::max(max_us_, took.count());
    ++calls_;
    const auto bin = static_cast<std::size_t>(took.count() * 10.0);
    ++bins_[std::min(bin, bins_.size() - 1)];
    return result;
  }

  Json report() const {
    std::int64_t below = 0;
    std::size_t bin = 0;
    while (bin < bins_.size() && (below += bins_[bin]) < calls_ * 99 / 100) ++bin;
    return {{"mean_us", calls_ > 0 ? sum_us_ / static_cast<double>(calls_) : 0.0},
            {"p99_us", static_cast<double>(bin + 1) / 10.0},
            {"max_us", max_us_}};
  }

 private:
  std::array<std::int64_t, 10'000> bins_{};
  std::int64_t calls_ = 0;
  double sum_us_ = 0.0;
  double max_us_ = 0.0;
};

/// What a static batch costs: each row runs, padded to the longest, until the whole batch ends.
struct PaddedBatch {
  double rows = 0.0;
  double longest = 0.0;  // tokens of a row when it joined
  double steps = 0.0;
  double ended = 0.0;  // rows that ended in it, rather than being set aside
};

/// One request of a trace and what became of it, in the caller's arrays.
struct Job {
  int prompt_tokens = 0;
  int output_tokens = 0;
  LengthDistribution expected;
};

class Simulation {
 public:
  explicit Simulation(const SimulationConfig& config)
      : config_(config), scheduler_(config.scheduler, config.make()) {}

  double now_s() const { return now_s_; }
  void wait_until(double seconds) { now_s_ = std::max(now_s_, seconds); }
  bool busy() const { return scheduler_.has_unfinished(); }
  SchedulerStats stats() const { return scheduler_.stats(); }

  void expect(SequenceId id, const LengthDistribution& length) { scheduler_.expect(id, length); }

  void add(SequenceId id, const Job& job, double arrival_s) {
    Sequence sequence;
    sequence.id = id;
    sequence.arrival = id;
    sequence.arrival_us = to_us(arrival_s);
    sequence.tokens.assign(static_cast<std::size_t>(job.prompt_tokens), 0);
    sequence.prompt_length = job.prompt_tokens;
    sequence.max_new_tokens = std::max(config_.max_tokens, job.output_tokens);
    sequence.expected_length = job.expected;
    scheduler_.add(std::move(sequence));
  }

  /// Runs a step. output_tokens(id) is where that sequence's answer ends; started(id) and
  /// sampled(id, tokens so far, whether it is the last one) are told what happened, the first
  /// before and the second after the time of the step has passed.
  template <typename OutputTokens, typename Started, typename Sampled>
  void step(OutputTokens&& output_tokens, Started&& started, Sampled&& sampled) {
    const ScheduledBatch& batch = planning_.time(
        [&]() -> const ScheduledBatch& { return scheduler_.schedule(to_us(now_s_)); });
    for (const ScheduledSequence& item : batch.items) {
      if (item.sequence->num_computed == 0) started(item.sequence->id);
    }
    const double ms = config_.padded ? padded_cost(batch) : cost(batch);
    now_s_ += ms * 1e-3;
    busy_s_ += ms * 1e-3;
    occupied_s_ += ms * 1e-3 * static_cast<double>(batch.items.size());
    ++steps_;
    most_resting_ = std::max(most_resting_, scheduler_.stats().num_resting);
    answers_.clear();
    for (const ScheduledSequence& item : batch.items) {
      if (!item.samples) continue;
      const int count = item.sequence->num_generated() + 1;
      const bool last = count >= output_tokens(item.sequence->id);
      answers_.push_back({item.sequence->id, 0, last});
      sampled(item.sequence->id, count, last);
      if (last) padded_.ended += 1.0;
    }
    updating_.time([&] {
      scheduler_.update(answers_);
      return 0;
    });
  }

  Json report() {
    close_padded();
    const SchedulerStats totals = scheduler_.stats();
    return {{"steps", steps_},
            {"seconds", now_s_},
            {"most_resting", most_resting_},
            {"mean_batch", busy_s_ > 0.0 ? occupied_s_ / busy_s_ : 0.0},
            {"returned_rows", returned_rows_},
            {"preemptions", totals.num_preemptions},
            {"evicted_for_decode", totals.evicted_for_decode},
            {"evicted_for_prefill", totals.evicted_for_prefill},
            {"set_aside", totals.set_aside},
            {"paused_steps", totals.paused_steps},
            {"promotions", totals.num_promotions},
            {"recomputed_tokens", totals.recomputed_tokens},
            {"planning", planning_.report()},
            {"updating", updating_.report()}};
  }

 private:
  static std::int64_t to_us(double seconds) { return static_cast<std::int64_t>(seconds * 1e6); }

  double cost(const ScheduledBatch& batch) const {
    double kv = 0.0;
    double prefill = 0.0;
    for (const ScheduledSequence& item : batch.items) {
      kv += item.sequence->num_computed + item.num_tokens;
      const bool decode = item.sequence->num_computed >= item.sequence->prompt_length &&
                          item.sequence->num_pending() == 1;
      if (!decode) prefill += item.num_tokens;
    }
    const StepCost& c = config_.cost;
    return c.a + c.b * static_cast<double>(batch.items.size()) + c.c * kv + c.p * prefill;
  }

  double padded_cost(const ScheduledBatch& batch) {
    const auto is_new = [](const ScheduledSequence& item) {
      return item.sequence->num_computed == 0;
    };
    if (std::ranges::all_of(batch.items, is_new)) close_padded();
    double joining = 0.0;
    for (const ScheduledSequence& item : batch.items) {
      if (!is_new(item)) continue;
      joining += 1.0;
      padded_.longest = std::max(padded_.longest, double(item.sequence->length()));
    }
    padded_.rows += joining;
    const StepCost& c = config_.cost;
    const double kv = padded_.rows * (padded_.longest + padded_.steps);
    padded_.steps += 1.0;
    return c.a + c.b * padded_.rows + c.c * kv + c.p * joining * padded_.longest;
  }

  void close_padded() {
    returned_rows_ += padded_.ended * padded_.steps;
    padded_ = {};
  }

  const SimulationConfig& config_;
  Scheduler scheduler_;
  double now_s_ = 0.0;
  double busy_s_ = 0.0;
  double occupied_s_ = 0.0;  // sequence seconds
  std::int64_t steps_ = 0;
  int most_resting_ = 0;
  PaddedBatch padded_;
  double returned_rows_ = 0.0;
  std::vector<SampledToken> answers_;
  DurationHistogram planning_;
  DurationHistogram updating_;
};

double resident_bytes() {
  long pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*s %ld", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return static_cast<double>(pages) * static_cast<double>(sysconf(_SC_PAGESIZE));
}

/// A cheap reproducible number in [0, 1).
double uniform(std::uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 11) * 0x1.0p-53;
}

std::string& result_text() {
  static thread_local std::string text;
  return text;
}

}  // namespace
}  // namespace deinfer::bench

using namespace deinfer;
using bench::guarded;

/// Plays a trace of n requests, ascending by arrival_s. expected_lengths and probabilities
/// [n, 1 + stages, bins] are beliefs about the output tokens, at first and after every `every`
/// generated tokens; bins may be 0, and a row of NaN is unknown. Fills start_s, first_s and end_s
/// [n]: first admission, first token, last token. Returns JSON.
BENCH_API const char* bench_schedule(const char* settings, int n, const double* arrival_s,
                                     const int* prompt_tokens, const int* output_tokens, int bins,
                                     int stages, int every, const float* expected_lengths,
                                     const float* probabilities, double* start_s, double* first_s,
                                     double* end_s) {
  return guarded<const char*>(nullptr, [&] {
    const bench::SimulationConfig config(bench::Json::parse(settings));
    bench::Simulation simulation(config);
    for (double* times : {start_s, first_s, end_s}) std::fill_n(times, n, -1.0);
    const auto belief = [&](std::ptrdiff_t id, int stage) -> LengthDistribution {
      if (bins == 0) return {};
      const std::ptrdiff_t row = (id * (1 + stages) + stage) * bins;
      const auto count = static_cast<std::size_t>(bins);
      return {{expected_lengths + row, count}, {probabilities + row, count}};
    };
    std::vector<std::pair<SequenceId, int>> refined;  // in a step, and to which stage
    int next = 0;
    while (next < n || simulation.busy()) {
      if (!simulation.busy()) simulation.wait_until(arrival_s[next]);
      for (; next < n && arrival_s[next] <= simulation.now_s(); ++next) {
        simulation.add(static_cast<SequenceId>(next),
                       {prompt_tokens[next], output_tokens[next], belief(next, 0)},
                       arrival_s[next]);
      }
      refined.clear();
      simulation.step([&](SequenceId id) { return output_tokens[id]; },
                      [&](SequenceId id) {
                        if (start_s[id] < 0.0) start_s[id] = simulation.now_s();
                      },
                      [&](SequenceId id, int tokens, bool last) {
                        if (first_s[id] < 0.0) first_s[id] = simulation.now_s();
                        if (last) end_s[id] = simulation.now_s();
                        if (last || stages == 0 || tokens % every != 0) return;
                        if (tokens / every <= stages) refined.emplace_back(id, tokens / every);
                      });
      for (const auto& [id, stage] : refined) {
        simulation.expect(id, belief(static_cast<std::ptrdiff_t>(id), stage));
      }
    }
    bench::result_text() = simulation.report().dump();
    return bench::result_text().c_str();
  });
}

/// Keeps `waiting` requests waiting until n have ended: planning times and the growth of resident
/// memory between a tenth of them and the end. Outputs of 1 to max_tokens tokens, beliefs half as
/// exact. Returns JSON.
BENCH_API const char* bench_schedule_soak(const char* settings, int n, int waiting) {
  return guarded<const char*>(nullptr, [&] {
    const bench::SimulationConfig config(bench::Json::parse(settings));
    bench::Simulation simulation(config);
    const int most = config.max_tokens;
    const auto output_tokens = [&](SequenceId id) {
      std::uint64_t seed = id * 0x9e3779b97f4a7c15u;
      bench::uniform(seed);
      return 1 + static_cast<int>(bench::uniform(seed) * (most - 1));
    };
    std::uint64_t state = 1;
    SequenceId next = 0;
    int ended = 0;
    double early_bytes = 0.0;
    while (ended < n) {
      while (simulation.stats().num_waiting < waiting) {
        const int output = output_tokens(next);
        const double believed = output * 0.5 + bench::uniform(state) * most * 0.5;
        simulation.add(next++,
                       {1 + static_cast<int>(bench::uniform(state) * 100), output,
                        LengthDistribution::point(static_cast<float>(believed))},
                       simulation.now_s());
      }
      simulation.step(
          output_tokens, [](SequenceId) {},
          [&](SequenceId, int, bool last) { ended += last ? 1 : 0; });
      if (early_bytes == 0.0 && ended >= n / 10) early_bytes = bench::resident_bytes();
    }
    bench::Json report = simulation.report();
    report["ended"] = ended;
    report["early_bytes"] = early_bytes;
    report["late_bytes"] = bench::resident_bytes();
    bench::result_text() = report.dump();
    return bench::result_text().c_str();
  });
}

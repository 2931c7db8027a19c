#include "deinfer/engine.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "base/check.h"
#include "base/cpu_topology.h"
#include "engine/device.h"
#include "engine/engine_info.h"
#include "engine/hidden_states.h"
#include "engine/kv_selection.h"
#include "engine/plan_choice.h"
#include "engine/request.h"
#include "engine/scheduler_setup.h"
#include "engine/step_batch.h"
#include "scheduler/event_log_file.h"
#include "scheduler/scheduler.h"

namespace deinfer {
namespace {

std::int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

struct Engine::Impl {
  Impl(EngineConfig engine_config, const LoadProgress& progress);

  RequestId submit(std::span<const TokenId> prompt, const SamplingParams& params,
                   const LengthBelief& belief);
  bool abort(RequestId id, std::optional<int> index);
  std::vector<RequestOutput> step();

  void take_inbox();
  /// Schedules a batch and starts it, if there is any work.
  void begin_step();
  /// Waits for the batch that was started and takes in what it brought.
  void finish_step();
  void mark_aborted();
  void update_stats();
  void fail(std::exception_ptr error);
  void end_sample(Request& request, int index, FinishReason reason, RequestOutput& output);
  RequestOutput& output_of(RequestId id);

  EngineConfig config;
  ModelConfig model;
  int max_model_len = 0;
  std::unique_ptr<RankGroup> ranks;
  EventLog events;  // of the step, where they are written
  std::optional<EventLogWriter> event_writer;
  std::unique_ptr<Scheduler> scheduler;
  std::unique_ptr<HiddenStates> hidden_states;
  ModelInfo info;
  RequestLimits limits;

  // Shared with submit() and abort(); guarded by the mutex.
  mutable std::mutex mutex;
  std::vector<std::unique_ptr<Request>> inbox;
  std::vector<std::pair<RequestId, int>> aborts;           // (request, sample)
  std::unordered_map<RequestId, std::vector<bool>> alive;  // samples that have not ended
  RequestId next_request = 0;
  EngineStats counters;
  AccuracyWindow accuracy;
  std::exception_ptr failure;

  // Of step() alone.
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests;
  SequenceOwners owners;
  SequenceId next_sequence = 0;
  const ScheduledBatch* started = nullptr;  // and not finished
  std::int64_t start_us = 0;                // when
  std::int64_t execute_us = 0;
  std::optional<StepBatch> step_batch;
  std::vector<SampledToken> sampled;
  std::map<RequestId, RequestOutput> outputs;
};

Engine::Impl::Impl(EngineConfig engine_config, const LoadProgress& progress)
    : config(std::move(engine_config)) {
  config.validate();
  check_argument(std::filesystem::is_directory(config.model), "model=\"", config.model,
                 "\" is not a directory");
  model = read_model_config(config.model);
  check_argument(config.max_model_len <= model.max_position_embeddings,
                 "max_model_len=", config.max_model_len,
                 " exceeds the model's max_position_embeddings=", model.max_position_embeddings);
  max_model_len = config.max_model_len > 0 ? config.max_model_len : model.max_position_embeddings;
  int threads = config.num_threads > 0
                    ? config.num_threads
                    : std::max(1, available_cores() / config.tensor_parallel_size);
  if (config.device != "cpu" && config.tensor_parallel_size > 1) prepare_concurrent_ranks();
  hidden_states = std::make_unique<HiddenStates>(config, model);
  PlanChoice choice = choose_plans(config, model, threads);
  std::string kv_reason = "dense: asked for";
  if (config.kv_cache != "dense") {
    KvChoice kv = select_kv_forms(config, model, choice.plans, threads, max_model_len);
    choice.kv_forms = std::move(kv.forms);
    fit_blocks(choice.kv_forms, config);
    kv_reason = std::move(kv.reason);
  }
  ranks = std::make_unique<RankGroup>(config, model, choice, threads, max_model_len, progress);
  std::int64_t blocks = choose_kv_blocks(config, *ranks, max_model_len);
  ranks->allocate_kv_cache(blocks);

  const SchedulerSetup setup = scheduler_setup(config, blocks, ranks->rank(0).step_sizes());
  scheduler = setup.make();
  if (!config.event_log.empty()) {
    event_writer.emplace(config.event_log, setup);
    scheduler->record(&events);
  }
  std::vector<Sampler> samplers;
  for (int i = 0; i < threads; ++i) {
    samplers.emplace_back(ranks->rank(0).kernels(), model.vocab_size);
  }
  step_batch.emplace(config.block_size, model.vocab_size, std::move(samplers));
  limits = {model.vocab_size, max_model_len, config.block_size, blocks,
            hidden_states->num_reported()};
  info = describe_model(config, model, *ranks, max_model_len, blocks);
  info.kv_reason = kv_reason;
  update_stats();
}

RequestId Engine::Impl::submit(std::span<const TokenId> prompt, const SamplingParams& params,
                               const LengthBelief& belief) {
  check_request(prompt, params, limits);
  LengthDistribution expected;
  if (!belief.lengths.empty() || !belief.probabilities.empty()) {
    expected = LengthDistribution(belief.lengths, belief.probabilities);
  }
  std::lock_guard lock(mutex);
  if (failure) std::rethrow_exception(failure);
  RequestId id = next_request++;
  // Spread the default seeds: neighbouring requests must not share random streams.
  std::uint64_t seed = config.seed * 0x9e3779b97f4a7c15u + id;
  inbox.push_back(std::make_unique<Request>(id, prompt, params, model.eos_token_ids, seed,
                                            max_model_len, expected));
  alive[id].assign(static_cast<std::size_t>(params.n), true);
  return id;
}

bool Engine::Impl::abort(RequestId id, std::optional<int> index) {
  std::lock_guard lock(mutex);
  auto found = alive.find(id);
  if (found == alive.end()) return false;
  std::vector<bool>& samples = found->second;
  bool any = false;
  for (int i = 0; i < static_cast<int>(samples.size()); ++i) {
    if ((index && *index != i) || !samples[static_cast<std::size_t>(i)]) continue;
    samples[static_cast<std::size_t>(i)] = false;
    aborts.emplace_back(id, i);
    any = true;
  }
  return any;
}

RequestOutput& Engine::Impl::output_of(RequestId id) {
  RequestOutput& output = outputs[id];
  output.request_id = id;
  return output;
}

void Engine::Impl::end_sample(Request& request, int index, FinishReason reason,
                              RequestOutput& output) {
  Request::Sample& sample = request.samples[static_cast<std::size_t>(index)];
  sample.ended = true;
  owners.erase(sample.sequence);
  output.outputs.back().finish_reason = reason;
  if (++request.num_ended < request.num_samples()) return;
  output.finished = true;
  requests.erase(request.id());
}

void Engine::Impl::take_inbox() {
  std::vector<std::unique_ptr<Request>> submitted;
  std::vector<std::pair<RequestId, int>> aborted;
  {
    std::lock_guard lock(mutex);
    submitted.swap(inbox);
    aborted.swap(aborts);
  }
  for (std::unique_ptr<Request>& request : submitted) {
    if (request->wants_prompt_rows(0)) request->prepare_prompt_rows(model.vocab_size);
    for (int i = 0; i < request->num_samples(); ++i) {
      SequenceId sequence = next_sequence++;
      request->samples[static_cast<std::size_t>(i)].sequence = sequence;
      owners[sequence] = {request.get(), i};
      scheduler->add(request->make_sequence(i, sequence, now_us()));
    }
    requests[request->id()] = std::move(request);
  }
  for (auto [id, index] : aborted) {
    auto found = requests.find(id);
    if (found == requests.end()) continue;
    Request& request = *found->second;
    if (request.samples[static_cast<std::size_t>(index)].ended) continue;
    scheduler->abort(request.samples[static_cast<std::size_t>(index)].sequence);
    RequestOutput& output = output_of(id);
    output.outputs.emplace_back().index = index;
    end_sample(request, index, FinishReason::kAbort, output);
  }
}

void Engine::Impl::mark_aborted() {
  std::lock_guard lock(mutex);
  for (auto [id, index] : aborts) {
    auto found = requests.find(id);
    if (found == requests.end()) continue;  // still in the inbox
    found->second->samples[static_cast<std::size_t>(index)].aborted = true;
  }
}

void Engine::Impl::begin_step() {
  take_inbox();
  const ScheduledBatch& scheduled = scheduler->schedule(now_us());
  if (scheduled.items.empty()) return;
  step_batch->build(scheduled, owners, *hidden_states, ranks->rank(0).sampling_room());
  start_us = now_us();
  ranks->start(step_batch->batch());
  started = &scheduled;
}

void Engine::Impl::finish_step() {
  const ScheduledBatch& scheduled = *std::exchange(started, nullptr);
  std::span<const TokenId> most_likely =
      ranks->finish([this](TeamMember& member, int first, int count, float* logits) {
        step_batch->take_logits(member, first, count, logits);
      });
  execute_us += now_us() - start_us;
  step_batch->take_sampled(ranks->rank(0).sampled());
  step_batch->take_most_likely(most_likely);
  mark_aborted();
  sampled.clear();
  std::vector<std::pair<RequestId, int>> ended;
  std::int64_t generated = 0;
  std::int64_t prompt_tokens = 0;
  hidden_states->begin(ranks->rank(0).hidden_states(), step_batch->batch().state_rows.size());
  for (const ScheduledSequence& item : scheduled.items) {
    int prompt_left = item.sequence->prompt_length - item.sequence->num_computed;
    prompt_tokens += std::clamp(prompt_left, 0, item.num_tokens);
    if (!item.samples) continue;
    auto [request, index] = owners.at(item.sequence->id);
    SampleResult& result = step_batch->result(sampled.size());
    int count = item.sequence->num_generated() + 1;
    Request::Sample& progress = request->samples[static_cast<std::size_t>(index)];
    // Restarted from its prompt, a sample has the same tokens again, which did not end it before;
    // an aborted one is not asked for any more.
    const bool unreported = count <= progress.num_reported || progress.aborted;
    FinishReason reason =
        unreported ? FinishReason::kNone : request->finish_reason(result.token, count);
    sampled.push_back({item.sequence->id, result.token, reason != FinishReason::kNone});
    if (unreported) {
      if (hidden_states->wants(*request)) hidden_states->skip();
      continue;
    }
    progress.num_reported = count;
    RequestOutput& output = output_of(request->id());
    if (request->wants_prompt_rows(index)) request->report_prompt(output);
    SequenceOutput& sample = output.outputs.emplace_back();
    sample.index = index;
    sample.new_token_ids = {result.token};
    if (request->params().logprobs) sample.logprobs.push_back(std::move(result.logprobs));
    if (reason == FinishReason::kStop) sample.stop_token_id = result.token;
    if (hidden_states->wants(*request)) {
      hidden_states->take(*request, request->samples[static_cast<std::size_t>(index)], count - 1,
                          reason != FinishReason::kNone, sample);
    }
    ++generated;
    if (reason != FinishReason::kNone) {
      ended.emplace_back(request->id(), index);
      end_sample(*request, index, reason, output);
    }
  }
  scheduler->update(sampled);
  hidden_states->tell(*scheduler);
  if (event_writer.has_value()) event_writer->drain(events);
  std::lock_guard lock(mutex);
  for (auto [id, index] : ended) {
    auto found = alive.find(id);
    if (found != alive.end()) found->second[static_cast<std::size_t>(index)] = false;
  }
  ++counters.num_steps;
  counters.prompt_tokens += prompt_tokens;
  counters.generated_tokens += generated;
  counters.execute_us = execute_us;
  counters.length_predictions = hidden_states->predictions();
  counters.length_predictor_us = hidden_states->predict_us();
}

std::vector<RequestOutput> Engine::Impl::step() {
  if (failure) std::rethrow_exception(failure);
  outputs.clear();
  try {
    if (started == nullptr) begin_step();
    if (started != nullptr) finish_step();
  } catch (...) {
    fail(std::current_exception());
    throw;
  }
  // While the caller reads what this step brought, a device computes the next. What the caller
  // then submits joins the one after it.
  if (ranks->is_asynchronous()) try {
      begin_step();
    } catch (...) {
      fail(std::current_exception());  // for the next call: this step has been done
    }
  update_stats();
  std::vector<RequestOutput> progressed;
  std::lock_guard lock(mutex);
  for (auto& [id, output] : outputs) {
    if (output.finished) alive.erase(id);
    progressed.push_back(std::move(output));
  }
  return progressed;
}

void Engine::Impl::fail(std::exception_ptr error) {
  // Half a step has been done; nothing can be trusted to go on.
  std::lock_guard lock(mutex);
  failure = std::move(error);
}

void Engine::Impl::update_stats() {
  SchedulerStats stats = scheduler->stats();
  std::vector<CollectiveStats> collectives = collective_stats(ranks->rank(0).communicator());
  std::lock_guard lock(mutex);
  counters.collectives = std::move(collectives);
  counters.num_waiting = stats.num_waiting;
  counters.num_running = stats.num_running;
  counters.free_kv_blocks = stats.free_blocks + stats.cached_blocks;
  counters.used_kv_blocks = stats.used_blocks;
  counters.promised_kv_blocks = stats.promised_blocks;
  counters.forecast_kv_blocks = stats.forecast_blocks;
  counters.kv_forecast_error = stats.forecast_error;
  counters.num_preemptions = stats.num_preemptions;
  counters.evicted_for_decode = stats.evicted_for_decode;
  counters.evicted_for_prefill = stats.evicted_for_prefill;
  counters.set_aside = stats.set_aside;
  counters.paused_steps = stats.paused_steps;
  counters.num_promotions = stats.num_promotions;
  counters.effective_token_ratio = stats.effective_token_ratio();
  if (accuracy.total() != scheduler->accuracy().total()) accuracy = scheduler->accuracy();
  counters.recomputed_tokens = stats.recomputed_tokens;
  counters.prefix_hit_tokens = stats.prefix_hit_tokens;
}

Engine::Engine(EngineConfig config, const LoadProgress& progress)
    : impl_(std::make_unique<Impl>(std::move(config), progress)) {}

Engine::~Engine() = default;

RequestId Engine::submit(std::span<const TokenId> prompt, const SamplingParams& params,
                         const LengthBelief& belief) {
  return impl_->submit(prompt, params, belief);
}

bool Engine::abort(RequestId id, std::optional<int> index) { return impl_->abort(id, index); }

std::vector<RequestOutput> Engine::step() { return impl_->step(); }

bool Engine::has_unfinished_requests() const {
  std::lock_guard lock(impl_->mutex);
  return !impl_->alive.empty();
}

const ModelInfo& Engine::model_info() const { return impl_->info; }

EngineStats Engine::stats() const {
  std::lock_guard lock(impl_->mutex);
  EngineStats stats = impl_->counters;
  stats.length_accuracy = impl_->accuracy.report();
  return stats;
}

std::vector<std::string> DEINFER_ABI::supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : detect_isas()) names.emplace_back(isa_name(isa));
  return names;
}

const char* DEINFER_ABI::version() { return DEINFER_VERSION; }

}  // namespace deinfer

// The C API: what engine.h does, behind handles and status codes.
#include "deinfer/deinfer.h"

#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "capi/field_text.h"
#include "deinfer/engine.h"

struct deinfer_config {
  deinfer::EngineConfig value;
};

struct deinfer_params {
  deinfer::SamplingParams value;
};

struct deinfer_engine {
  deinfer::Engine value;
};

struct deinfer_outputs {
  struct Entry {
    deinfer_output output{};
    std::vector<deinfer::TokenId> tokens;
    std::vector<float> logprobs;
  };
  std::vector<Entry> entries;
};

namespace {

using deinfer::Error;
using deinfer::ErrorCode;

thread_local std::string last_error;

deinfer_status failed(deinfer_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {  // no memory for the message
    last_error.clear();
  }
  return status;
}

deinfer_status status_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument: return DEINFER_INVALID_ARGUMENT;
    case ErrorCode::kUnsupported: return DEINFER_UNSUPPORTED;
    case ErrorCode::kOutOfMemory: return DEINFER_OUT_OF_MEMORY;
    case ErrorCode::kInternal: break;
  }
  return DEINFER_INTERNAL;
}

/// Runs a call; nothing that it throws goes further.
template <typename F>
deinfer_status guarded(F f) noexcept {
  try {
    f();
    return DEINFER_OK;
  } catch (const Error& error) {
    return failed(status_of(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return failed(DEINFER_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(DEINFER_INTERNAL, error.what());
  } catch (...) {
    return failed(DEINFER_INTERNAL, "an unknown exception");
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw Error(ErrorCode::kInvalidArgument, std::string(name) + " is NULL");
  }
}

deinfer_finish finish_of(deinfer::FinishReason reason) {
  switch (reason) {
    case deinfer::FinishReason::kNone: return DEINFER_RUNNING;
    case deinfer::FinishReason::kStop: return DEINFER_STOP;
    case deinfer::FinishReason::kLength: return DEINFER_LENGTH;
    case deinfer::FinishReason::kAbort: return DEINFER_ABORT;
  }
  return DEINFER_RUNNING;
}

deinfer_outputs::Entry make_entry(const deinfer::RequestOutput& request,
                                  deinfer::SequenceOutput& sample) {
  deinfer_outputs::Entry entry;
  entry.tokens = std::move(sample.new_token_ids);
  for (const std::vector<deinfer::TokenLogprob>& token : sample.logprobs) {
    entry.logprobs.push_back(token.front().logprob);  // the chosen one stands first
  }
  entry.output.request = request.request_id;
  entry.output.sample = sample.index;
  entry.output.finish = finish_of(sample.finish_reason);
  entry.output.request_finished = request.finished ? 1 : 0;
  return entry;
}

}  // namespace

const char* deinfer_version(void) { return deinfer::version(); }

const char* deinfer_last_error(void) { return last_error.c_str(); }

deinfer_status deinfer_config_create(deinfer_config** config) {
  return guarded([&] {
    require(config, "config");
    *config = new deinfer_config{};
  });
}

deinfer_status deinfer_config_set(deinfer_config* config, const char* name, const char* value) {
  return guarded([&] {
    require(config, "config");
    require(name, "name");
    require(value, "value");
    deinfer::capi::set_field(config->value, "EngineConfig", name, value);
  });
}

void deinfer_config_destroy(deinfer_config* config) { delete config; }

deinfer_status deinfer_params_create(deinfer_params** params) {
  return guarded([&] {
    require(params, "params");
    *params = new deinfer_params{};
  });
}

deinfer_status deinfer_params_set(deinfer_params* params, const char* name, const char* value) {
  return guarded([&] {
    require(params, "params");
    require(name, "name");
    require(value, "value");
    deinfer::capi::set_field(params->value, "SamplingParams", name, value);
  });
}

void deinfer_params_destroy(deinfer_params* params) { delete params; }

deinfer_status deinfer_engine_create(const deinfer_config* config, deinfer_engine** engine) {
  return guarded([&] {
    require(config, "config");
    require(engine, "engine");
    *engine = new deinfer_engine{deinfer::Engine(config->value)};
  });
}

void deinfer_engine_destroy(deinfer_engine* engine) { delete engine; }

deinfer_status deinfer_engine_model_info(const deinfer_engine* engine, deinfer_model_info* info) {
  return guarded([&] {
    require(engine, "engine");
    require(info, "info");
    const deinfer::ModelInfo& model = engine->value.model_info();
    *info = {model.num_layers, model.hidden_size,  model.vocab_size,    model.max_model_len,
             model.parameters, model.weight_bytes, model.kv_cache_bytes};
  });
}

deinfer_status deinfer_engine_get_stats(const deinfer_engine* engine, deinfer_engine_stats* stats) {
  return guarded([&] {
    require(engine, "engine");
    require(stats, "stats");
    deinfer::EngineStats now = engine->value.stats();
    *stats = {now.num_waiting,     now.num_running,   now.free_kv_blocks,  now.num_steps,
              now.num_preemptions, now.prompt_tokens, now.generated_tokens};
  });
}

deinfer_status deinfer_engine_submit(deinfer_engine* engine, const int32_t* prompt, size_t length,
                                     const deinfer_params* params, uint64_t* request) {
  return guarded([&] {
    require(engine, "engine");
    if (length > 0) require(prompt, "prompt");
    require(request, "request");
    *request = engine->value.submit(std::span(prompt, length),
                                    params == nullptr ? deinfer::SamplingParams{} : params->value);
  });
}

deinfer_status deinfer_engine_abort(deinfer_engine* engine, uint64_t request, int32_t sample,
                                    int32_t* ended) {
  return guarded([&] {
    require(engine, "engine");
    if (sample < -1) {
      throw Error(ErrorCode::kInvalidArgument,
                  "sample must be -1 or an index, got " + std::to_string(sample));
    }
    bool any = engine->value.abort(request, sample < 0 ? std::nullopt : std::optional<int>(sample));
    if (ended != nullptr) *ended = any ? 1 : 0;
  });
}

int32_t deinfer_engine_has_unfinished(const deinfer_engine* engine) {
  int32_t unfinished = 0;
  guarded([&] {
    require(engine, "engine");
    unfinished = engine->value.has_unfinished_requests() ? 1 : 0;
  });
  return unfinished;
}

deinfer_status deinfer_engine_step(deinfer_engine* engine, deinfer_outputs** outputs) {
  return guarded([&] {
    require(engine, "engine");
    require(outputs, "outputs");
    auto step = std::make_unique<deinfer_outputs>();
    for (deinfer::RequestOutput& request : engine->value.step()) {
      for (deinfer::SequenceOutput& sample : request.outputs) {
        step->entries.push_back(make_entry(request, sample));
      }
    }
    *outputs = step.release();
  });
}

size_t deinfer_outputs_count(const deinfer_outputs* outputs) {
  return outputs == nullptr ? 0 : outputs->entries.size();
}

deinfer_status deinfer_outputs_get(const deinfer_outputs* outputs, size_t index,
                                   deinfer_output* output) {
  return guarded([&] {
    require(outputs, "outputs");
    require(output, "output");
    if (index >= outputs->entries.size()) {
      throw Error(ErrorCode::kInvalidArgument, "output " + std::to_string(index) + " of " +
                                                   std::to_string(outputs->entries.size()));
    }
    const deinfer_outputs::Entry& entry = outputs->entries[index];
    *output = entry.output;
    output->tokens = entry.tokens.data();
    output->num_tokens = entry.tokens.size();
    output->logprobs = entry.logprobs.empty() ? nullptr : entry.logprobs.data();
  });
}

void deinfer_outputs_destroy(deinfer_outputs* outputs) { delete outputs; }

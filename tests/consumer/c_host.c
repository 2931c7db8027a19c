/* A C host: everything of deinfer/deinfer.h, errors included. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "deinfer/deinfer.h"

static void check(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "failed: %s (last error: %s)\n", what, deinfer_last_error());
  exit(1);
}

static void refused(deinfer_status status, const char* part, const char* what) {
  check(status == DEINFER_INVALID_ARGUMENT, what);
  check(strstr(deinfer_last_error(), part) != NULL, what);
}

static deinfer_engine* load(const char* model) {
  deinfer_config* config = NULL;
  deinfer_engine* engine = NULL;
  check(deinfer_config_create(&config) == DEINFER_OK, "config_create");
  check(deinfer_config_set(config, "model", model) == DEINFER_OK, "model");
  check(deinfer_config_set(config, "num_threads", "1") == DEINFER_OK, "num_threads");
  check(deinfer_config_set(config, "kv_cache_bytes", "1048576") == DEINFER_OK, "kv_cache_bytes");
  check(deinfer_config_set(config, "enable_prefix_caching", "false") == DEINFER_OK, "a flag");
  refused(deinfer_config_set(config, "num_thread", "1"), "num_thread", "an unknown field");
  refused(deinfer_config_set(config, "num_threads", "two"), "two", "text for a number");
  refused(deinfer_config_set(config, "num_threads", "1.5"), "1.5", "a fraction");
  refused(deinfer_config_set(config, "num_threads", "99999999999"), "99999999999", "too large");
  refused(deinfer_config_set(config, "enable_prefix_caching", "yes"), "yes", "no flag");
  refused(deinfer_config_set(NULL, "model", model), "config", "NULL config");
  refused(deinfer_config_set(config, NULL, model), "name", "NULL name");
  check(deinfer_engine_create(config, &engine) == DEINFER_OK, "engine_create");
  deinfer_config_destroy(config);
  return engine;
}

static void load_nothing(void) {
  deinfer_config* config = NULL;
  deinfer_engine* engine = NULL;
  check(deinfer_config_create(&config) == DEINFER_OK, "config_create");
  check(deinfer_config_set(config, "model", "no/such/model") == DEINFER_OK, "model");
  refused(deinfer_engine_create(config, &engine), "no/such/model", "a missing model");
  check(engine == NULL, "no engine");
  deinfer_config_destroy(config);
}

int main(int argc, char** argv) {
  const int32_t prompt[] = {1, 2, 3};
  const int32_t outside[] = {1, 1000000};
  deinfer_model_info info;
  deinfer_engine_stats stats;
  deinfer_params* params = NULL;
  uint64_t first = 0, second = 0, bad = 0;
  int32_t ended = 0;
  size_t tokens = 0, finished = 0, aborted = 0;
  deinfer_engine* engine;
  if (argc != 2) return 2;

  check(strcmp(deinfer_version(), DEINFER_VERSION) == 0, "version");
  check(strcmp(deinfer_last_error(), "") == 0, "no error yet");
  load_nothing();
  engine = load(argv[1]);
  check(deinfer_engine_model_info(engine, &info) == DEINFER_OK, "model_info");
  check(info.vocab_size == 64 && info.num_layers == 2 && info.weight_bytes > 0, "its values");

  check(deinfer_params_create(&params) == DEINFER_OK, "params_create");
  check(deinfer_params_set(params, "temperature", "0.7") == DEINFER_OK, "temperature");
  check(deinfer_params_set(params, "seed", "42") == DEINFER_OK, "an optional");
  check(deinfer_params_set(params, "seed", "none") == DEINFER_OK, "an empty optional");
  check(deinfer_params_set(params, "n", "2") == DEINFER_OK, "n");
  check(deinfer_params_set(params, "max_tokens", "7") == DEINFER_OK, "max_tokens");
  check(deinfer_params_set(params, "ignore_eos", "true") == DEINFER_OK, "ignore_eos");
  check(deinfer_params_set(params, "stop_token_ids", "") == DEINFER_OK, "an empty list");
  check(deinfer_params_set(params, "logprobs", "0") == DEINFER_OK, "logprobs");
  refused(deinfer_params_set(params, "stop_token_ids", "2,x"), "2,x", "a bad list");

  check(deinfer_engine_submit(engine, prompt, 3, params, &first) == DEINFER_OK, "submit");
  check(deinfer_engine_submit(engine, prompt, 2, NULL, &second) == DEINFER_OK, "submit");
  check(first != second, "requests of their own");
  refused(deinfer_engine_submit(engine, prompt, 0, NULL, &bad), "empty", "an empty prompt");
  refused(deinfer_engine_submit(engine, NULL, 3, NULL, &bad), "prompt", "NULL prompt");
  refused(deinfer_engine_submit(engine, outside, 2, NULL, &bad), "1000000", "a bad token");
  check(deinfer_params_set(params, "top_p", "7") == DEINFER_OK, "ranges are checked later");
  refused(deinfer_engine_submit(engine, prompt, 3, params, &bad), "top_p", "top_p");
  deinfer_params_destroy(params);

  check(deinfer_engine_abort(engine, second, -1, &ended) == DEINFER_OK && ended == 1, "abort");
  check(deinfer_engine_abort(engine, 999, -1, &ended) == DEINFER_OK && ended == 0, "unknown");
  refused(deinfer_engine_abort(engine, second, -2, &ended), "-2", "a bad sample");

  while (deinfer_engine_has_unfinished(engine)) {
    deinfer_outputs* outputs = NULL;
    deinfer_output output;
    size_t i, t;
    check(deinfer_engine_step(engine, &outputs) == DEINFER_OK, "step");
    for (i = 0; i < deinfer_outputs_count(outputs); ++i) {
      check(deinfer_outputs_get(outputs, i, &output) == DEINFER_OK, "outputs_get");
      if (output.request == second) {
        check(output.finish == DEINFER_ABORT && output.num_tokens == 0, "aborted");
        ++aborted;
        continue;
      }
      check(output.request == first && (output.sample == 0 || output.sample == 1), "sample");
      for (t = 0; t < output.num_tokens; ++t) {
        check(output.tokens[t] >= 0 && output.tokens[t] < info.vocab_size, "token");
        check(output.logprobs != NULL && output.logprobs[t] <= 0.0f, "logprob");
      }
      tokens += output.num_tokens;
      if (output.finish == DEINFER_LENGTH) ++finished;
    }
    refused(deinfer_outputs_get(outputs, i, &output), "output", "an index too large");
    deinfer_outputs_destroy(outputs);
  }
  check(tokens == 14 && finished == 2 && aborted == 1, "two samples of 7 tokens");
  check(deinfer_engine_get_stats(engine, &stats) == DEINFER_OK, "stats");
  check(stats.generated_tokens == 14 && stats.num_running == 0, "their values");
  deinfer_engine_destroy(engine);
  deinfer_engine_destroy(NULL);
  deinfer_outputs_destroy(NULL);
  puts("ok");
  return 0;
}

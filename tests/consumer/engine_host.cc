// A C++ host: several requests at once, ranks, abort, errors.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "deinfer/engine.h"
#include "deinfer/planner.h"

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

using Answers = std::map<deinfer::RequestId, std::vector<deinfer::TokenId>>;

Answers generate(const std::string& model, int ranks) {
  deinfer::EngineConfig config;
  config.model = model;
  config.tensor_parallel_size = ranks;
  config.num_threads = 1;
  config.kv_cache_bytes = 1 << 20;
  deinfer::Engine engine(config);
  check(engine.model_info().lowrank_matrices == 12, "12 low-rank matrices");
  check(engine.model_info().tensor_parallel_size == ranks, "ranks");
  deinfer::SamplingParams greedy;
  greedy.temperature = 0.0f;
  greedy.max_tokens = 12;
  greedy.ignore_eos = true;
  Answers answers;
  for (int length = 1; length <= 4; ++length) {
    std::vector<deinfer::TokenId> prompt(static_cast<std::size_t>(length), 3 * length);
    answers[engine.submit(prompt, greedy)];
  }
  deinfer::RequestId aborted = engine.submit(std::vector<deinfer::TokenId>{1, 2}, greedy);
  check(engine.abort(aborted), "abort of a request");
  int ended = 0;
  while (engine.has_unfinished_requests()) {
    for (const deinfer::RequestOutput& output : engine.step()) {
      for (const deinfer::SequenceOutput& sample : output.outputs) {
        if (output.request_id == aborted) {
          check(sample.finish_reason == deinfer::FinishReason::kAbort, "kAbort");
          continue;
        }
        std::vector<deinfer::TokenId>& answer = answers.at(output.request_id);
        answer.insert(answer.end(), sample.new_token_ids.begin(), sample.new_token_ids.end());
        if (sample.finish_reason == deinfer::FinishReason::kLength) ++ended;
      }
    }
  }
  check(ended == 4, "four answers");
  for (const auto& [id, answer] : answers) check(answer.size() == 12, "12 tokens each");
  check(engine.stats().generated_tokens >= 48, "stats");
  return answers;
}

}  // namespace

int main(int, char** argv) {
  const std::string model = argv[1];
  check(std::strcmp(deinfer::version(), DEINFER_VERSION) == 0, "version of headers and library");
  check(generate(model, 1) == generate(model, 2), "the same tokens on two ranks");
  deinfer::EngineConfig bad;
  bad.model = model + "/nowhere";
  try {
    deinfer::Engine engine(bad);
    check(false, "an error for a missing model");
  } catch (const deinfer::Error& error) {
    check(error.code() == deinfer::ErrorCode::kInvalidArgument, "its code");
    check(std::strstr(error.what(), "nowhere") != nullptr, "its message");
  }
  deinfer::PlannerConfig planner;
  planner.model = model;
  planner.tensor_parallel_size = 2;
  check(!deinfer::plan_tensor_parallelism(planner).decode_plan.empty(), "a plan");
  std::puts("ok");
  return 0;
}

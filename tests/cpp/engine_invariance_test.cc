// A request's tokens and log-probabilities have the same bits alone and in any company.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>

#include "deinfer/engine.h"
#include "sanitized.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

struct RequestSpec {
  std::vector<TokenId> prompt;
  SamplingParams params;
};

/// What a sample produced; compared bit by bit.
struct Answer {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  std::vector<float> prompt_logprobs;
  FinishReason reason = FinishReason::kNone;
  bool operator==(const Answer&) const = default;
};

using Answers = std::vector<std::map<int, Answer>>;  // [request][sample]

void collect(std::vector<RequestOutput> outputs, const std::map<RequestId, std::size_t>& places,
             Answers& answers) {
  for (RequestOutput& output : outputs) {
    auto& request = answers[places.at(output.request_id)];
    for (SequenceOutput& sample : output.outputs) {
      Answer& answer = request[sample.index];
      answer.tokens.insert(answer.tokens.end(), sample.new_token_ids.begin(),
                           sample.new_token_ids.end());
      for (const auto& entries : sample.logprobs) {
        for (const TokenLogprob& entry : entries) answer.logprobs.push_back(entry.logprob);
      }
      if (sample.finish_reason != FinishReason::kNone) answer.reason = sample.finish_reason;
    }
    for (const auto& entries : output.prompt_logprobs) {
      request[0].prompt_logprobs.push_back(entries.at(0).logprob);
    }
  }
}

/// Submits all requests, a few at a time when `trickle`, and steps until done.
Answers run(Engine& engine, const std::vector<RequestSpec>& requests, bool trickle) {
  Answers answers(requests.size());
  std::map<RequestId, std::size_t> places;
  std::size_t next = 0;
  int steps = 0;
  while (next < requests.size() || engine.has_unfinished_requests()) {
    std::size_t until = trickle ? std::min(requests.size(), next + 1) : requests.size();
    for (; next < until; ++next) {
      places[engine.submit(requests[next].prompt, requests[next].params)] = next;
    }
    collect(engine.step(), places, answers);
    if (++steps > 5000) {
      ADD_FAILURE() << "the engine does not finish";
      break;
    }
  }
  return answers;
}

std::vector<RequestSpec> random_requests(std::mt19937& random, int count) {
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<RequestSpec> requests;
  std::vector<TokenId> shared;
  for (int i = 0; i < 40; ++i) shared.push_back(below(97));
  for (int i = 0; i < count; ++i) {
    RequestSpec spec;
    if (below(3) == 0) spec.prompt.assign(shared.begin(), shared.begin() + below(40));
    int length = 1 + below(below(4) == 0 ? 100 : 20);
    for (int j = 0; j < length; ++j) spec.prompt.push_back(below(97));
    spec.params.max_tokens = 1 + below(40);
    spec.params.temperature = below(3) == 0 ? 0.0f : 0.9f;
    spec.params.seed = random();
    // Beliefs have no say in what is generated, right or wrong.
    if (i % 3 != 0) spec.params.expected_tokens = static_cast<float>(1 + i * 7 % 60);
    spec.params.n = below(4) == 0 ? 3 : 1;
    if (below(2) == 0) spec.params.top_p = 0.8f;
    if (below(3) == 0) spec.params.top_k = 5;
    if (below(3) == 0) spec.params.repetition_penalty = 1.3f;
    if (below(2) == 0) spec.params.logprobs = 3;
    if (below(4) == 0) spec.params.prompt_logprobs = 0;
    requests.push_back(std::move(spec));
  }
  return requests;
}

/// Runs the same requests one by one and in many ways of batching them; where that is slow, in
/// every third of them, counted from `turn`.
void expect_invariance(test::TinyConfig tiny, const std::string& dtype, int turn,
                       bool slow = test::kSanitized) {
  tiny.bfloat16 = dtype != "float32";
  tiny.max_position = 600;  // beyond one KV split
  test::TinyModel model(tiny);
  std::mt19937 random(tiny.bfloat16 ? 5 : 3);
  std::vector<RequestSpec> requests = random_requests(random, 18);
  RequestSpec& longest = requests.emplace_back(requests.front());
  while (longest.prompt.size() < 540) longest.prompt.push_back(random() % 97);
  longest.params.n = 1;

  EngineConfig alone;
  alone.model = model.path();
  alone.dtype = dtype;
  alone.num_threads = 1;
  alone.max_num_seqs = 1;
  alone.max_num_batched_tokens = 600;
  alone.enable_prefix_caching = false;
  alone.num_kv_blocks = 64;
  Engine reference(alone);
  Answers expected;
  for (const RequestSpec& request : requests) {
    expected.push_back(run(reference, {request}, false)[0]);
  }

  std::int64_t preemptions = 0;
  std::int64_t prefix_hits = 0;
  struct Trial {
    int threads, seats, budget, block_size, blocks;
    bool prefix_caching, trickle;
    const char* policy = "fcfs";
    const char* admission = "prompt";
    const char* recompute = "continue";
  };
  int index = 0;
  for (const Trial& trial :
       {Trial{1, 64, 512, 16, 38, false, false},  // preempts
        Trial{2, 64, 33, 16, 38, true, true},     // preempts and shares
        Trial{3, 7, 100, 32, 20, true, false}, Trial{2, 2, 5, 16, 64, true, false},
        Trial{1, 64, 1, 16, 200, true, true},  // token by token
        Trial{2, 64, 512, 64, 64, false, true, "fcfs", "peak"},
        Trial{1, 64, 512, 16, 38, true, true, "hrrn", "peak"},
        Trial{2, 64, 512, 16, 38, false, false, "length_bucket"},
        Trial{1, 6, 512, 16, 38, true, true, "longest_tail", "peak"},
        Trial{2, 3, 512, 16, 300, true, true, "longest_tail", "peak"},  // takes turns
        Trial{2, 64, 512, 16, 38, true, true, "sjf", "prompt"},
        Trial{1, 64, 512, 16, 100, true, false, "sjf", "max_tokens"},
        Trial{2, 64, 512, 16, 38, true, true, "static", "prompt"},
        Trial{1, 64, 512, 16, 100, false, false, "static_bucket", "prompt"},
        Trial{2, 64, 100, 16, 100, true, true, "static_bucket", "prompt", "restart"}}) {
    bool needed = index == 1;  // preempts and shares
    if (slow && index++ % 3 != turn % 3 && !needed) continue;
    EngineConfig config;
    config.model = model.path();
    config.dtype = dtype;
    config.num_threads = trial.threads;
    config.max_num_seqs = trial.seats;
    config.max_num_batched_tokens = trial.budget;
    config.block_size = trial.block_size;
    config.num_kv_blocks = trial.blocks;
    config.enable_prefix_caching = trial.prefix_caching;
    config.scheduling_policy = trial.policy;
    config.admission = trial.admission;
    config.recompute = trial.recompute;
    config.bucket_width = 10;  // so that some outlive their bucket
    config.max_pause = trial.trickle ? 2 : 0;
    Engine engine(config);
    EXPECT_EQ(run(engine, requests, trial.trickle), expected)
        << "budget " << trial.budget << " " << dtype << " " << trial.policy;
    preemptions += engine.stats().num_preemptions;
    prefix_hits += engine.stats().prefix_hit_tokens;
  }
  EXPECT_GT(preemptions, 0) << "the trials are meant to preempt";
  EXPECT_GT(prefix_hits, 0) << "the trials are meant to share prefixes";
}

class EngineInvariance : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::vector<std::string> isas = supported_isas();
    if (std::find(isas.begin(), isas.end(), GetParam()) == isas.end()) {
      GTEST_SKIP() << "this CPU lacks " << GetParam();
    }
    setenv("DEINFER_CPU_ISA", GetParam().c_str(), 1);
  }
  void TearDown() override { unsetenv("DEINFER_CPU_ISA"); }
};

TEST_P(EngineInvariance, AnswersDoNotDependOnTheBatch) {
  const bool slow = test::kSanitized || GetParam() == "scalar";
  int turn = 0;
  for (std::string dtype : {"float32", "bfloat16", "int8"}) {
    if (test::kSanitized && GetParam() == "scalar" && dtype != "bfloat16") continue;  // minutes
    expect_invariance({}, dtype, turn++, slow);
  }
}

TEST(FamilyInvariance, AnswersDoNotDependOnTheBatch) {
  int turn = 0;
  for (std::string family :
       {"gemma2", "gemma3_text", "mistral", "olmo2", "opt", "qwen2", "qwen3"}) {
    SCOPED_TRACE(family);
    test::TinyConfig tiny;
    tiny.family = family;
    tiny.window = 70;
    expect_invariance(tiny, "bfloat16", turn++);
  }
}

TEST_P(EngineInvariance, GreedyTokensDoNotDependOnWhetherLogitsAreAskedFor) {
  test::TinyModel model;
  std::mt19937 random(7);
  for (int threads : {1, 3}) {
    EngineConfig config;
    config.model = model.path();
    config.num_threads = threads;
    config.num_kv_blocks = 100;
    Engine engine(config);
    std::vector<RequestSpec> requests = random_requests(random, 12);
    for (RequestSpec& request : requests) {
      request.params = {};
      request.params.max_tokens = 20;
      request.params.temperature = 0.0f;
    }
    Answers plain = run(engine, requests, false);
    for (RequestSpec& request : requests) request.params.logprobs = 2;
    Answers reported = run(engine, requests, false);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(plain[i].at(0).tokens, reported[i].at(0).tokens);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, EngineInvariance,
                         testing::Values("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"));

/// Every sequence outlives its bucket; what it generates a second time is not reported again.
TEST(EngineStaticBatches, RecomputedSamplesReportEveryTokenOnce) {
  test::TinyModel model;
  std::vector<RequestSpec> requests(20);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = {static_cast<TokenId>(i + 1), 5, 9};
    requests[i].params.max_tokens = 20 + static_cast<int>(i % 5);
    requests[i].params.ignore_eos = true;
    requests[i].params.temperature = 0.9f;
    requests[i].params.seed = i;
    requests[i].params.logprobs = 2;
    requests[i].params.expected_tokens = 4.0f;
  }
  EngineConfig config;
  config.model = model.path();
  config.num_threads = 1;
  config.num_kv_blocks = 100;
  Engine plain(config);
  const Answers expected = run(plain, requests, false);
  std::int64_t steps = -7;
  config.scheduling_policy = "static_bucket";
  config.bucket_width = 7;
  config.enable_prefix_caching = false;
  for (const char* recompute : {"continue", "restart"}) {
    config.recompute = recompute;
    Engine engine(config);
    EXPECT_EQ(run(engine, requests, false), expected) << recompute;
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.set_aside, 20) << recompute;
    EXPECT_EQ(stats.generated_tokens, plain.stats().generated_tokens) << recompute;
    EXPECT_EQ(stats.recomputed_tokens, 20 * (3 + 6)) << recompute;
    EXPECT_GE(stats.num_steps, steps + 7) << recompute << " after continue";
    steps = stats.num_steps;
  }
}

}  // namespace
}  // namespace deinfer

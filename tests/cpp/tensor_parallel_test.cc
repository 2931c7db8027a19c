// Whole models over several ranks: every plan computes what one rank computes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "deinfer/engine.h"
#include "plan/tensor_parallel_plan.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

struct Outcome {
  std::vector<float> logits;  // of all prompt tokens
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  bool operator==(const Outcome&) const = default;
};

/// Prompt logits, greedy tokens and sampled tokens with log-probabilities of a few requests.
Outcome run(const test::TinyModel& model, const std::string& plan, int ranks,
            const std::string& dtype = "float32", int threads = 1, int budget = 64) {
  EngineConfig config;
  config.model = model.path();
  config.dtype = dtype;
  config.tensor_parallel_size = ranks;
  config.tensor_parallel_plan = plan;
  config.num_threads = threads;
  config.max_num_batched_tokens = budget;
  config.num_kv_blocks = 64;
  Engine engine(config);
  std::mt19937 random(7);
  std::vector<RequestId> ids;
  for (int length : {1, 9, 40, 23}) {
    std::vector<TokenId> prompt;
    for (int i = 0; i < length; ++i) prompt.push_back(static_cast<TokenId>(random() % 97));
    SamplingParams params;
    params.temperature = length == 23 ? 0.8f : 0.0f;
    params.seed = 3;
    params.max_tokens = 12;
    params.ignore_eos = true;
    params.prompt_logits = length == 40 || length == 9;
    if (length == 23) params.logprobs = 2;
    ids.push_back(engine.submit(prompt, params));
  }
  std::vector<Outcome> runs(ids.size());
  while (engine.has_unfinished_requests()) {
    for (RequestOutput& output : engine.step()) {
      Outcome& request = runs[static_cast<std::size_t>(
          std::find(ids.begin(), ids.end(), output.request_id) - ids.begin())];
      request.logits.insert(request.logits.end(), output.prompt_logits.begin(),
                            output.prompt_logits.end());
      for (const SequenceOutput& sample : output.outputs) {
        request.tokens.insert(request.tokens.end(), sample.new_token_ids.begin(),
                              sample.new_token_ids.end());
        for (const auto& entries : sample.logprobs) {
          for (const TokenLogprob& entry : entries) request.logprobs.push_back(entry.logprob);
        }
      }
    }
  }
  Outcome all;
  for (const Outcome& one : runs) {
    all.logits.insert(all.logits.end(), one.logits.begin(), one.logits.end());
    all.tokens.insert(all.tokens.end(), one.tokens.begin(), one.tokens.end());
    all.logprobs.insert(all.logprobs.end(), one.logprobs.begin(), one.logprobs.end());
  }
  return all;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size() || a.empty()) return 1.0;
  double difference = 0.0;
  double size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(b[i], 2);
  }
  return std::sqrt(difference / size);
}

struct Kind {
  std::string name;
  test::TinyConfig config;
};

std::vector<Kind> kinds() {
  test::TinyConfig base;
  base.hidden = 64;
  base.intermediate = 144;
  base.heads = 8;
  base.kv_heads = 4;
  base.all_low_rank = true;
  std::vector<Kind> all{{"ragged_ranks", base}};
  base.tied = false;
  base.kv_heads = 2;
  base.all_low_rank = false;
  all.push_back({"mixed_untied_gqa", base});
  base.low_rank = false;
  all.push_back({"dense", base});
  base.low_rank = base.all_low_rank = true;
  base.tied = true;
  base.hidden = 80;
  base.head_dim = 12;  // half a head is no multiple of 16
  base.kv_heads = 8;
  all.push_back({"mha_odd_heads", base});
  base.hidden = 48;  // fewer units of 16 columns than ranks
  base.kv_heads = 1;
  all.push_back({"one_kv_head", base});
  return all;
}

class TensorParallel : public testing::TestWithParam<std::string> {};

TEST_P(TensorParallel, EverySizeComputesWhatOneRankComputes) {
  for (const Kind& kind : kinds()) {
    test::TinyModel model(kind.config);
    Outcome one = run(model, "hidden_sharded", 1);
    for (int ranks : {1, 2, 3, 4, 6, 8}) {
      Outcome many = run(model, GetParam(), ranks);
      EXPECT_LE(distance(many.logits, one.logits), 1e-5) << kind.name << ", " << ranks << " ranks";
      EXPECT_LE(distance(many.logprobs, one.logprobs), 1e-4)
          << kind.name << ", " << ranks << " ranks";
      EXPECT_EQ(many.tokens, one.tokens) << kind.name << ", " << ranks << " ranks";
    }
  }
}

TEST_P(TensorParallel, RunsRepeatBitForBitWhateverTheThreadsAndBatches) {
  test::TinyModel model(kinds()[0].config);
  for (std::string dtype : {"float32", "bfloat16"}) {
    Outcome one = run(model, GetParam(), 3, dtype);
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype));
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype, 2));
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype, 1, 5));
  }
}

std::vector<std::string> all_plans() {
  std::vector<std::string> names;
  for (std::string_view name : plan_names()) names.emplace_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Plans, TensorParallel, testing::ValuesIn(all_plans()),
                         [](const auto& plan) { return plan.param; });

}  // namespace
}  // namespace deinfer

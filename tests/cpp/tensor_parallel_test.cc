// Whole models over several ranks: every plan computes what one rank computes.
#include <gtest/gtest.h>

#include <map>

#include "comm/communicator.h"
#include "deinfer/engine.h"
#include "engine_outcome.h"
#include "model/planned_model.h"
#include "plan/exchanges.h"
#include "sanitized.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::distance;
using test::Outcome;

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
  return test::run_requests(engine, {1, 9, 40, 23}, 6, {9, 40});
}

using test::Kind;

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

/// What Llama does not have: biases, norms of q and k, norms of what blocks add, LayerNorm, a plain
/// MLP, learned positions, soft caps, windows and rotations of some layers.
std::vector<Kind> family_kinds() {
  std::vector<Kind> all;
  for (std::string family : {"opt", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text"}) {
    test::TinyConfig config;
    config.family = family;
    config.window = 11;
    config.hidden = 64;
    config.intermediate = 144;
    config.heads = 8;
    config.tied = family == "opt" || family.starts_with("gemma");
    config.all_low_rank = true;
    all.push_back({family + "_ragged_ranks", config});
    config.all_low_rank = false;
    config.kv_heads = 4;
    all.push_back({family + "_mixed", config});
    config.low_rank = false;
    all.push_back({family + "_dense", config});
    config.low_rank = config.all_low_rank = true;
    config.hidden = 48;
    config.kv_heads = 1;
    all.push_back({family + "_few_columns", config});
  }
  return all;
}

class TensorParallel : public testing::TestWithParam<std::string> {};

void expect_same_as_one_rank(const Kind& kind, const std::string& plan,
                             const std::vector<int>& sizes) {
  test::TinyModel model(kind.config);
  Outcome one = run(model, "hidden_sharded", 1);
  for (int ranks : sizes) {
    SCOPED_TRACE(kind.name + ", " + std::to_string(ranks) + " ranks");
    Outcome many = run(model, plan, ranks);
    EXPECT_LE(distance(many.logits, one.logits), 1e-5);
    EXPECT_LE(distance(many.logprobs, one.logprobs), 1e-4);
    EXPECT_EQ(many.tokens, one.tokens);
  }
}

TEST_P(TensorParallel, EverySizeComputesWhatOneRankComputes) {
  for (const Kind& kind : kinds()) {
    expect_same_as_one_rank(kind, GetParam(), {1, 2, 3, 4, 6, 8});
  }
}

TEST_P(TensorParallel, EveryFamilyComputesWhatItDoesOnOneRank) {
  int turn = 0;
  for (const Kind& kind : family_kinds()) {
    std::vector<int> sizes{1, 2, 3, 4, 8};
    if (test::kSanitized) sizes = {1, 2 + turn++ % 3};
    expect_same_as_one_rank(kind, GetParam(), sizes);
  }
}

// z of rows whose mean is far from 0 is a small difference of large numbers, which bf16 must not
// hold.
TEST_P(TensorParallel, LayerNormOfShiftedRowsIsAsExactInBfloat16AsOnOneRank) {
  test::TinyConfig config;
  config.family = "opt";
  config.hidden = 256;
  config.heads = 8;
  config.all_low_rank = true;
  config.bfloat16 = true;  // float32 runs have the same weights
  config.position_mean = 8.0f;
  const std::vector<int> sizes{1, 2, 3, 4, 8};
  std::vector<double> errors(sizes.size());
  for (std::uint32_t seed = 1; seed <= 8; ++seed) {  // that of one model varies by a tenth
    test::TinyModel model(config, seed);
    const std::vector<float> exact = run(model, GetParam(), 1, "float32").logits;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      errors[i] += distance(run(model, GetParam(), sizes[i], "bfloat16").logits, exact);
    }
  }
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    EXPECT_LE(errors[i], 1.1 * errors[0]) << sizes[i] << " ranks";
  }
}

TEST_P(TensorParallel, RunsRepeatBitForBitWhateverTheThreadsAndBatches) {
  auto expect_repeats = [](const test::TinyModel& model, const std::string& dtype) {
    Outcome one = run(model, GetParam(), 3, dtype);
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype));
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype, 2));
    EXPECT_EQ(one, run(model, GetParam(), 3, dtype, 1, 5));
  };
  test::TinyModel llama(kinds()[0].config);
  expect_repeats(llama, "float32");
  expect_repeats(llama, "bfloat16");
  for (const Kind& kind : family_kinds()) {
    if (kind.name != "opt_mixed" && kind.name != "olmo2_mixed") continue;
    test::TinyModel model(kind.config);
    EXPECT_EQ(run(model, GetParam(), 3, "bfloat16"), run(model, GetParam(), 3, "bfloat16", 2, 16));
  }
}

/// Calls and bytes of rank 0, by kind of exchange.
using Counts = std::map<std::string, std::pair<std::uint64_t, std::uint64_t>>;

Counts counts_of(const Engine& engine) {
  Counts counts;
  for (const CollectiveStats& kind : engine.stats().collectives) {
    counts[kind.name] = {kind.calls, kind.bytes};
  }
  return counts;
}

TEST_P(TensorParallel, StepsExchangeWhatThePlanSays) {
  constexpr int kPrompt = 7, kRanks = 3;
  std::vector<Kind> all = kinds();
  for (const Kind& kind : family_kinds()) all.push_back(kind);
  for (Kind& kind : all) {
    SCOPED_TRACE(kind.name);
    kind.config.head_dim =
        32;  // naive sends q and k as they are packed for the rotation: no padding
    test::TinyModel model(kind.config);
    EngineConfig config;
    config.model = model.path();
    config.dtype = "bfloat16";
    config.tensor_parallel_size = kRanks;
    config.tensor_parallel_plan = GetParam();
    config.num_threads = 1;
    config.num_kv_blocks = 8;
    Engine engine(config);
    Counts expected = counts_of(engine);  // of loading
    SamplingParams params;
    params.temperature = 0.0f;
    params.max_tokens = 2;
    params.ignore_eos = true;
    engine.submit(std::vector<TokenId>(kPrompt, 5), params);
    const PlannedModel planned = planned_model(read_model_config(model.path()), 0.0, "bfloat16");
    auto plan = make_plan(GetParam(), planned.shape, kRanks);
    for (int tokens : {kPrompt, 1}) {
      engine.step();
      for (const PlannedExchange& exchange : step_exchanges(
               *plan, planned.layers, {tokens, 0, 1}, 0, planned.activation_bytes, planned.norms)) {
        auto& [calls, bytes] = expected[collective_name(exchange.kind)];
        ++calls;
        bytes += exchange.bytes;
      }
    }
    EXPECT_EQ(counts_of(engine), expected);
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

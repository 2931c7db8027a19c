// Engines that cache latents compute what those with a dense cache do.
#include <gtest/gtest.h>

#include "deinfer/engine.h"
#include "engine_outcome.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::distance;
using test::Kind;
using test::Outcome;

EngineConfig config_of(const test::TinyModel& model, const std::string& kv_cache) {
  EngineConfig config;
  config.model = model.path();
  config.dtype = "float32";
  config.kv_cache = kv_cache;
  config.kv_latents = "replicated";
  config.tensor_parallel_plan = "hidden_sharded";
  config.num_threads = 1;
  config.max_num_batched_tokens = 64;
  config.num_kv_blocks = 128;
  return config;
}

const std::vector<int> kShort = {1, 9, 40, 23};
const std::vector<int> kLong = {1, 9, 40, 23, 300, 310};

Outcome run(const EngineConfig& config, const std::vector<int>& lengths, int max_tokens = 8,
            std::int64_t* preemptions = nullptr) {
  Engine engine(config);
  Outcome outcome = test::run_requests(engine, lengths, max_tokens, {40, 300, 600});
  if (preemptions != nullptr) *preemptions = engine.stats().num_preemptions;
  return outcome;
}

test::TinyConfig base_config() {
  test::TinyConfig config;
  config.hidden = 64;
  config.intermediate = 80;
  config.heads = 8;
  config.kv_heads = 4;
  config.max_position = 512;  // beyond one KV split
  config.all_low_rank = true;
  return config;
}

std::vector<Kind> kinds() { return test::latent_kinds(base_config()); }

class LatentKv : public testing::TestWithParam<Kind> {};

TEST_P(LatentKv, ComputesWhatADenseCacheDoes) {
  test::TinyModel model(GetParam().config);
  const Outcome dense = run(config_of(model, "dense"), kLong);
  EngineConfig config = config_of(model, "latent");
  const Outcome latent = run(config, kLong);
  EXPECT_LE(distance(latent.logits, dense.logits), 1e-5);
  EXPECT_LE(distance(latent.logprobs, dense.logprobs), 1e-4);
  EXPECT_EQ(latent.tokens, dense.tokens);
  // K and V that are rebuilt have the bits of dense ones, here as no norm is over all heads.
  if (GetParam().name == "values_rebuilt") {
    EXPECT_EQ(latent, dense);
  }
}

TEST_P(LatentKv, BitsDoNotDependOnThreadsBatchesAndPreemption) {
  test::TinyModel model(GetParam().config);
  EngineConfig config = config_of(model, "latent");
  for (const char* dtype : {"float32", "bfloat16"}) {
    config.dtype = dtype;
    const Outcome expected = run(config, kLong, 30);
    EngineConfig other = config;
    other.num_threads = 2;
    other.max_num_batched_tokens = 300;
    other.enable_prefix_caching = false;
    EXPECT_EQ(run(other, kLong, 30), expected) << dtype;
    other = config;
    other.max_num_batched_tokens = 17;
    other.num_kv_blocks = 40;  // the two long ones need 42
    other.enable_prefix_caching = false;
    other.admission = "prompt";
    other.max_pause = 0;
    other.kv_watermark = 0.0;
    std::int64_t preemptions = 0;
    EXPECT_EQ(run(other, kLong, 30, &preemptions), expected) << dtype;
    EXPECT_GT(preemptions, 0);
  }
}

TEST_P(LatentKv, SeveralRanksComputeWhatOneDoes) {
  test::TinyModel model(GetParam().config);
  const Outcome one = run(config_of(model, "dense"), kShort);
  for (const char* plan : {"hidden_sharded", "rank_gather", "two_collective", "token_sharded"}) {
    for (int ranks : {2, 3}) {
      if (ranks == 3 && plan != std::string("hidden_sharded")) continue;
      SCOPED_TRACE(std::string(plan) + ", " + std::to_string(ranks) + " ranks");
      EngineConfig config = config_of(model, "latent");
      config.tensor_parallel_plan = plan;
      config.tensor_parallel_size = ranks;
      config.exchange_chunks = 2;
      const Outcome many = run(config, kShort);
      EXPECT_LE(distance(many.logits, one.logits), 1e-5);
      EXPECT_EQ(many.tokens, one.tokens);
    }
  }
}

EngineConfig token_sharded(const test::TinyModel& model, int ranks) {
  EngineConfig config = config_of(model, "latent");
  config.kv_latents = "token_sharded";
  config.tensor_parallel_size = ranks;
  return config;
}

TEST_P(LatentKv, RanksMayDivideTheTokens) {
  test::TinyModel model(GetParam().config);
  auto expect_near = [](const Outcome& many, const Outcome& one) {
    EXPECT_LE(distance(many.logits, one.logits), 1e-5);
    EXPECT_LE(distance(many.logprobs, one.logprobs), 1e-4);
    EXPECT_EQ(many.tokens, one.tokens);
  };
  expect_near(run(token_sharded(model, 2), kLong), run(config_of(model, "dense"), kLong));
  const Outcome one = run(config_of(model, "dense"), kShort);
  expect_near(run(token_sharded(model, 3), kShort), one);
  for (const char* plan : {"rank_gather", "two_collective", "token_sharded"}) {
    SCOPED_TRACE(plan);
    EngineConfig config = token_sharded(model, 2);
    config.tensor_parallel_plan = plan;
    config.exchange_chunks = 2;
    expect_near(run(config, kShort), one);
  }
}

TEST(LatentKvRanks, MayHaveSeveralSplitsEach) {
  for (Kind kind : kinds()) {
    if (kind.name != "llama_gqa" && kind.name != "olmo2" && kind.name != "opt" &&
        kind.name != "gemma3") {
      continue;
    }
    SCOPED_TRACE(kind.name);
    kind.config.max_position = 700;
    test::TinyModel model(kind.config);
    const std::vector<int> lengths = {600, 9};  // the first has 300 tokens on each of 2 ranks
    const Outcome one = run(config_of(model, "dense"), lengths);
    EngineConfig config = token_sharded(model, 2);
    config.num_threads = 2;
    const Outcome many = run(config, lengths);
    EXPECT_LE(distance(many.logits, one.logits), 1e-5);
    EXPECT_EQ(many.tokens, one.tokens);
    config.num_threads = 1;
    config.max_num_batched_tokens = 230;
    EXPECT_EQ(run(config, lengths), many);
  }
}

TEST_P(LatentKv, BitsOfDividedTokensDoNotDependOnBatchesAndPreemption) {
  test::TinyModel model(GetParam().config);
  EngineConfig config = token_sharded(model, 2);
  config.dtype = "bfloat16";
  config.max_num_batched_tokens = 300;  // beyond what is exchanged at once
  const Outcome expected = run(config, kLong, 30);
  EngineConfig other = config;
  other.max_num_batched_tokens = 17;
  other.num_kv_blocks = 40;  // of 16 tokens, as blocks of 32 still have place for
  other.enable_prefix_caching = false;
  other.admission = "prompt";
  other.max_pause = 0;
  other.kv_watermark = 0.0;
  std::int64_t preemptions = 0;
  EXPECT_EQ(run(other, kLong, 30, &preemptions), expected);
  EXPECT_GT(preemptions, 0);
}

TEST_P(LatentKv, IsAsExactInBfloat16AsADenseCache) {
  // Norms of all that blocks add magnify roundings in some models tenfold, with either cache.
  const std::uint32_t seeds = GetParam().config.family == "olmo2" ? 16 : 4;
  for (const char* dtype : {"bfloat16", "int8"}) {
    double dense = 0, latent = 0;
    for (std::uint32_t seed = 1; seed <= seeds; ++seed) {
      test::TinyConfig tiny = GetParam().config;
      tiny.bfloat16 = true;  // float32 runs have the same weights
      tiny.max_position = 384;
      test::TinyModel model(tiny, seed);
      const std::vector<int> prompts = {40, 300};
      const std::vector<float> exact = run(config_of(model, "dense"), prompts, 1).logits;
      EngineConfig config = config_of(model, "dense");
      config.dtype = dtype;
      dense += distance(run(config, prompts, 1).logits, exact);
      config.kv_cache = "latent";
      latent += distance(run(config, prompts, 1).logits, exact);
    }
    EXPECT_LE(latent, 1.2 * dense) << dtype;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, LatentKv, testing::ValuesIn(kinds()),
                         [](const auto& kind) { return kind.param.name; });

TEST(LatentKvErrors, NameWhatIsMissing) {
  auto message = [](const EngineConfig& config) -> std::string {
    try {
      Engine engine(config);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "none";
  };
  test::TinyModel model(base_config());
  EngineConfig config = config_of(model, "compressed");
  EXPECT_NE(message(config).find("kv_cache=\"compressed\" is unknown"), std::string::npos);
  for (const char* plan : {"naive", "dense"}) {
    config = config_of(model, "latent");
    config.tensor_parallel_size = 2;
    config.tensor_parallel_plan = plan;
    EXPECT_NE(message(config).find(std::string("under the plan ") + plan), std::string::npos);
    config.kv_cache = "auto";
    Engine engine(config);
    for (const KvLayerInfo& layer : engine.model_info().kv_layers) {
      EXPECT_EQ(layer.k + layer.v, "densedense");
    }
  }
  test::TinyConfig dense = base_config();
  dense.all_low_rank = false;
  test::TinyModel undecomposed(dense);
  EXPECT_NE(message(config_of(undecomposed, "latent")).find("is decomposed"), std::string::npos);
}

}  // namespace
}  // namespace deinfer

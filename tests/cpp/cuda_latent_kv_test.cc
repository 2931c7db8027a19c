// CUDA engines that cache latents, against CPU engines that do and CUDA engines with a dense cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "cuda_engine_fixture.h"
#include "cuda_fixture.h"
#include "expect_error.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Answer;
using test::generate;
using test::greedy;
using test::Kind;
using test::Request;
using test::requests_of;

class CudaLatentKv : public test::CudaDeviceTest {};

EngineConfig engine_config(const test::TinyModel& model, const std::string& device,
                           const std::string& kv_cache = "latent") {
  EngineConfig config = test::config_for(model, device);
  config.kv_cache = kv_cache;
  config.hidden_state_layers.clear();
  return config;
}

test::TinyConfig base_config() {
  test::TinyConfig config;
  config.bfloat16 = true;
  config.all_low_rank = true;
  return config;
}

std::vector<Kind> kinds() { return test::latent_kinds(base_config()); }

bool is_one_of(const Kind& kind, std::initializer_list<const char*> names) {
  return std::find(names.begin(), names.end(), kind.name) != names.end();
}

/// The distance of engines from fp32 on the CPU with K and V, beside that of bf16 there: with K and
/// V or with latents, which either is, by chance.
class LatentComparison {
 public:
  LatentComparison(const test::TinyModel& model, int length) {
    EngineConfig config = engine_config(model, "cpu", "dense");
    config.dtype = "float32";
    exact_.emplace(config, length);
    config.dtype = "bfloat16";
    for (const char* kv_cache : {"latent", "dense"}) {
      config.kv_cache = kv_cache;
      rounding_ = std::max(rounding_, exact_->distance(config));
    }
  }

  /// Not much farther than the CPU's bf16.
  void check(Engine& engine, double factor) { exact_->check(engine, factor, rounding_); }

 private:
  std::optional<test::Comparison> exact_;
  double rounding_ = 0;
};

TEST_F(CudaLatentKv, ComputesTheLogitsOfTheCpuEngine) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    test::TinyModel model(kind.config);
    // Beyond one split where there is one kind of attention.
    LatentComparison comparison(model, is_one_of(kind, {"llama_gqa", "opt"}) ? 150 : 40);
    Engine engine(engine_config(model, "cuda"));
    comparison.check(engine, 1.5);
  }
}

TEST_F(CudaLatentKv, RebuiltSidesHaveTheBitsOfADenseCache) {
  for (const Kind& kind : kinds()) {
    if (!is_one_of(kind, {"values_rebuilt"})) continue;
    test::TinyModel model(kind.config);
    std::vector<Request> requests = requests_of(40);
    for (Request& request : requests) request.params.logprobs = 1;
    EngineConfig latent_config = engine_config(model, "cuda");
    EngineConfig dense_config = engine_config(model, "cuda", "dense");
    for (const char* dtype : {"bfloat16", "int8"}) {
      latent_config.dtype = dense_config.dtype = dtype;
      Engine latent(latent_config), dense(dense_config);
      for (const KvLayerInfo& layer : latent.model_info().kv_layers) {
        EXPECT_EQ(layer.k + " " + layer.v, "rebuilt rebuilt");
      }
      EXPECT_EQ(generate(latent, requests), generate(dense, requests)) << dtype;
    }
  }
}

/// Of a token of the kind of model `name`.
void check_bits_in_any_batch(std::string_view name) {
  for (const Kind& kind : kinds()) {
    if (kind.name != name) continue;
    test::TinyModel model(kind.config);
    std::vector<Request> requests;
    for (const int length : {14, 15, 13, 135}) {
      Request request = greedy(length, length, length < 100 ? 20 : 6);
      request.params.logprobs = 1;
      requests.push_back(request);
    }
    EngineConfig config = engine_config(model, "cuda");
    Engine together(config);
    const std::vector<Answer> all = generate(together, requests, true);
    EXPECT_EQ(generate(together, requests, false), all)
        << "alone, prefixes that are cached, graphs";
    config.enable_prefix_caching = false;
    config.max_num_batched_tokens = 32;
    config.num_kv_blocks = 13;  // 12 for the prompts, 18 for all
    config.admission = "prompt";
    config.max_pause = 0;
    config.kv_watermark = 0.0;
    Engine crowded(config);
    EXPECT_EQ(generate(crowded, requests, true), all) << "other chunks, preemptions";
    EXPECT_GT(crowded.stats().num_preemptions, 0);
    return;
  }
  FAIL() << "there is no kind " << name;
}

TEST_F(CudaLatentKv, ATokenHasTheSameBitsInAnyBatchWhereKeysAreRebuilt) {
  check_bits_in_any_batch("llama_mha");
}

TEST_F(CudaLatentKv, ATokenHasTheSameBitsInAnyBatchWhereKeysAreAbsorbed) {
  check_bits_in_any_batch("opt");
}

TEST_F(CudaLatentKv, SeveralRanksComputeWhatOneDoes) {
  const char* const plans[] = {"hidden_sharded", "rank_gather", "two_collective", "token_sharded"};
  int turn = 0;
  for (const Kind& kind : kinds()) {
    if (!is_one_of(kind, {"llama_gqa", "llama_mha", "mixed_layers", "olmo2", "opt", "gemma3"})) {
      continue;
    }
    test::TinyModel model(kind.config);
    LatentComparison comparison(model, 21);
    for (const int ranks : {2, 3}) {
      EngineConfig config = engine_config(model, "cuda");
      config.tensor_parallel_size = ranks;
      config.tensor_parallel_plan = plans[turn++ % 4];
      SCOPED_TRACE(kind.name + ", " + config.tensor_parallel_plan);
      Engine engine(config);
      comparison.check(engine, 2.0);
    }
  }
}

TEST_F(CudaLatentKv, RanksHaveTheSameBitsInEveryWay) {
  test::TinyConfig tiny = base_config();
  tiny.family = "olmo2";
  test::TinyModel model(tiny);
  std::vector<Request> requests;
  for (int i = 0; i < 3; ++i) {
    requests.push_back(greedy(3 + 13 * i % 31, i, 3 + i % 2));
    requests.back().params.logprobs = 1;
  }
  EngineConfig config = engine_config(model, "cuda");
  config.tensor_parallel_size = 3;
  config.tensor_parallel_plan = "hidden_sharded";
  Engine together(config);
  const std::vector<Answer> all = generate(together, requests);
  config.enable_prefix_caching = false;
  config.max_num_batched_tokens = 24;
  config.num_kv_blocks = 6;
  Engine crowded(config);
  EXPECT_EQ(generate(crowded, requests, false), all);
}

TEST_F(CudaLatentKv, SaysWhatItKeeps) {
  test::TinyConfig tiny = base_config();
  tiny.dense_value_layer = 1;
  test::TinyModel model(tiny);
  Engine latent(engine_config(model, "cuda")), dense(engine_config(model, "cuda", "dense"));
  const ModelInfo& info = latent.model_info();
  // Heads of 8 elements take 64, ranks multiples of 8.
  const std::uint64_t side = 2 * 64 * 2;
  ASSERT_EQ(info.kv_layers.size(), 2u);
  EXPECT_EQ(info.kv_layers[0].k + " " + info.kv_layers[0].v, "rebuilt absorbed");
  EXPECT_EQ(info.kv_layers[0].k_bytes, 8u * 2);
  EXPECT_EQ(info.kv_layers[0].v_bytes, 24u * 2);
  EXPECT_EQ(info.kv_layers[1].k + " " + info.kv_layers[1].v, "rebuilt dense");
  EXPECT_EQ(info.kv_layers[1].v_bytes, side);
  EXPECT_EQ(info.kv_bytes_per_token, 2 * 16 + 48 + side);
  EXPECT_EQ(info.dense_kv_bytes_per_token, 4 * side);
  EXPECT_EQ(dense.model_info().kv_bytes_per_token, 4 * side);
  EXPECT_EQ(info.kv_cache_bytes, info.kv_bytes_per_token * 64 * 16);
}

TEST_F(CudaLatentKv, AutoChoosesWhatPays) {
  test::TinyConfig tiny = base_config();
  tiny.family = "opt";
  tiny.k_rank = tiny.v_rank = 4;
  test::TinyModel model(tiny);
  for (const int ranks : {1, 2}) {
    EngineConfig config = engine_config(model, "cuda", "auto");
    config.tensor_parallel_size = ranks;
    config.tensor_parallel_plan = "hidden_sharded";
    config.num_kv_blocks = 0;
    config.kv_cache_bytes = std::size_t{256} << 10;
    config.max_num_seqs = 64;
    Engine engine(config);
    const ModelInfo& info = engine.model_info();
    EXPECT_LT(info.kv_bytes_per_token, info.dense_kv_bytes_per_token) << info.kv_reason;
    for (const KvLayerInfo& layer : info.kv_layers) EXPECT_EQ(layer.ranks, 1);
    EXPECT_EQ(generate(engine, {greedy(9, 1, 3)})[0].tokens.size(), 3u);
  }
}

TEST_F(CudaLatentKv, RefusesWhatItCannotDo) {
  test::TinyModel model(base_config());
  EngineConfig config = engine_config(model, "cuda");
  config.tensor_parallel_size = 2;
  config.kv_latents = "token_sharded";
  test::expect_error(ErrorCode::kUnsupported, "kv_latents=\"token_sharded\": on CUDA devices",
                     [&] { Engine engine(config); });
  config.kv_latents = "auto";
  config.tensor_parallel_plan = "naive";
  test::expect_error(ErrorCode::kInvalidArgument, "under the plan naive",
                     [&] { Engine engine(config); });
}

}  // namespace
}  // namespace deinfer

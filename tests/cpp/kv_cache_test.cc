// What a KV cache takes: allocated, reported and computed by hand, whatever each layer keeps.
#include "ops/kv_cache.h"

#include <gtest/gtest.h>

#include <random>

#include "deinfer/engine.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

TEST(KvCache, TakesWhatTheFormulaSaysInEveryLayer) {
  std::mt19937 random(11);
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 100; ++round) {
    KvTraits traits;
    traits.group = 1 + below(4);
    traits.head_dim = 2 * (1 + below(64));
    traits.absorbs_keys = below(2) == 0;
    traits.scales_keys = !traits.absorbs_keys && below(2) == 0;
    const int kv_heads = 1 + below(8);
    const int ranks = 1 + below(4);
    KvCacheConfig config;
    config.block_size = 16 * ranks * (1 + below(4));
    config.rank = below(ranks);
    config.num_blocks = below(5);
    config.dtype = below(2) == 0 ? DType::kFloat32 : DType::kBFloat16;
    const auto element = dtype_size(config.dtype);
    struct Layer {
      std::uint64_t k_bytes, v_bytes, tokens;  // bytes of a token, kept tokens of a block
    };
    std::vector<Layer> expected;
    std::uint64_t total = 0;
    for (int layer = 0; layer < 1 + below(6); ++layer) {
      const int k_rank = 1 + below(300), v_rank = 1 + below(300);
      const KvForm k = below(3) == 0 ? KvForm::kDense : latent_key_form(traits, k_rank);
      const KvForm v = below(3) == 0 ? KvForm::kDense : latent_value_form(traits, v_rank);
      const int divided_by = below(2) == 0 ? ranks : 1;
      config.layers.push_back({kv_key_shape(traits, k, k_rank, kv_heads, static_cast<int>(element)),
                               kv_value_shape(traits, v, v_rank, kv_heads), divided_by});
      auto bytes = [&](KvForm form, int rank) {
        int width = kv_heads * traits.head_dim;
        if (form != KvForm::kDense) width = rank;
        if (form == KvForm::kRebuilt) width += rank % 2;
        return static_cast<std::uint64_t>(width) * element;
      };
      const bool scaled = k == KvForm::kRebuilt && traits.scales_keys;
      expected.push_back({bytes(k, k_rank) + (scaled ? 4 : 0), bytes(v, v_rank),
                          static_cast<std::uint64_t>(config.block_size / divided_by)});
      total += (expected.back().k_bytes + expected.back().v_bytes) * expected.back().tokens;
    }
    EXPECT_EQ(config.block_bytes(), total);
    KvCache cache(config);
    const auto blocks = static_cast<std::uint64_t>(config.num_blocks);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto& [k_bytes, v_bytes, tokens] = expected[i];
      EXPECT_EQ(config.token_bytes(config.layers[i].k), k_bytes);
      EXPECT_EQ(config.token_bytes(config.layers[i].v), v_bytes);
      EXPECT_EQ(cache.k_bytes(static_cast<int>(i)), k_bytes * tokens * blocks);
      EXPECT_EQ(cache.v_bytes(static_cast<int>(i)), v_bytes * tokens * blocks);
    }
  }
}

EngineConfig engine_config(const test::TinyModel& model, int ranks, const char* latents) {
  EngineConfig config;
  config.model = model.path();
  config.num_threads = 1;
  config.kv_cache = "latent";
  config.kv_latents = latents;
  config.tensor_parallel_size = ranks;
  config.tensor_parallel_plan = "hidden_sharded";
  config.kv_cache_bytes = 1 << 20;
  return config;
}

test::TinyConfig tiny_config() {
  test::TinyConfig tiny;
  tiny.all_low_rank = true;
  tiny.kv_heads = 6;
  tiny.k_rank = 7;
  tiny.v_rank = 11;
  tiny.dense_key_layer = 1;
  return tiny;
}

TEST(KvCache, EnginesReportWhatTheyAllocate) {
  test::TinyModel model(tiny_config());
  for (int ranks : {1, 2, 3}) {
    for (const char* latents : {"replicated", "token_sharded"}) {
      SCOPED_TRACE(std::string(latents) + ", " + std::to_string(ranks) + " ranks");
      const EngineConfig config = engine_config(model, ranks, latents);
      Engine engine(config);
      const ModelInfo& info = engine.model_info();
      const bool divided = ranks > 1 && latents == std::string("token_sharded");
      ASSERT_EQ(info.kv_layers.size(), 2u);
      EXPECT_EQ(info.kv_layers[0].k, "rebuilt");
      EXPECT_EQ(info.kv_layers[1].k, "dense");
      EXPECT_EQ(info.kv_layers[0].v, "absorbed");
      const auto heads = static_cast<std::uint64_t>(divided ? 6 : 6 / ranks);
      for (const KvLayerInfo& layer : info.kv_layers) {
        EXPECT_EQ(layer.ranks, divided ? ranks : 1);
        EXPECT_EQ(layer.v_bytes, 11u * 4);
      }
      EXPECT_EQ(info.kv_layers[0].k_bytes, 8u * 4);
      EXPECT_EQ(info.kv_layers[1].k_bytes, heads * 8 * 4);
      const auto all = static_cast<std::uint64_t>(divided ? 1 : ranks);  // that keep a latent
      EXPECT_EQ(info.kv_bytes_per_token, all * (8 + 11 + 11) * 4 + 6 * 8 * 4);
      EXPECT_EQ(info.dense_kv_bytes_per_token, 2u * 2 * 6 * 8 * 4);
      EXPECT_EQ(info.block_size, divided ? 16 * ranks : 16);
      const std::uint64_t block_bytes =
          info.kv_bytes_per_token * static_cast<std::uint64_t>(info.block_size);
      EXPECT_EQ(info.kv_cache_bytes, block_bytes * static_cast<std::uint64_t>(info.num_kv_blocks));
      EXPECT_LE(info.kv_cache_bytes, config.kv_cache_bytes);
      EXPECT_GT(info.kv_cache_bytes + block_bytes, config.kv_cache_bytes);
    }
  }
}

TEST(KvCache, BlocksOfDividedTokensHoldNoFewerTokensThanAskedFor) {
  test::TinyModel model(tiny_config());
  EngineConfig config = engine_config(model, 3, "token_sharded");
  config.block_size = 64;
  config.num_kv_blocks = 10;
  Engine engine(config);
  EXPECT_EQ(engine.model_info().block_size, 96);
  EXPECT_EQ(engine.model_info().num_kv_blocks, 7);  // 672 tokens for 640
}

}  // namespace
}  // namespace deinfer

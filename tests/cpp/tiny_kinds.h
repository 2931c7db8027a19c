// Small models of one kind each, for tests that run over all of them.
#pragma once

#include <string>
#include <vector>

#include "tiny_model.h"

namespace deinfer::test {

struct Kind {
  std::string name;
  TinyConfig config;
};

/// Every way in which K and V come from latents; `base` has all_low_rank.
inline std::vector<Kind> latent_kinds(const TinyConfig& base) {
  std::vector<Kind> all;
  auto add = [&](const std::string& name, auto change) {
    TinyConfig config = base;
    change(config);
    all.push_back({name, config});
  };
  add("llama_gqa", [](auto& c) { c.biases = true; });
  add("llama_mha", [](auto& c) { c.kv_heads = c.heads, c.k_rank = 33, c.v_rank = 17; });
  add("rank_1", [](auto& c) { c.k_rank = c.v_rank = 1; });
  add("full_rank", [](auto& c) { c.kv_heads = c.heads, c.k_rank = c.v_rank = c.hidden; });
  add("odd_heads", [](auto& c) { c.head_dim = 12, c.kv_heads = 2; });
  add("mixed_layers",
      [](auto& c) { c.layers = 3, c.dense_key_layer = 0, c.dense_value_layer = 1; });
  add("values_rebuilt", [](auto& c) { c.heads = 16, c.head_dim = 4, c.kv_heads = 1; });
  add("mistral", [](auto& c) { c.family = "mistral", c.window = 11; });
  add("qwen2", [](auto& c) { c.family = "qwen2"; });
  add("qwen3", [](auto& c) { c.family = "qwen3"; });
  add("olmo2", [](auto& c) { c.family = "olmo2"; });
  add("gemma2", [](auto& c) { c.family = "gemma2", c.window = 9; });
  add("gemma3",
      [](auto& c) { c.family = "gemma3_text", c.window = c.max_position / 7, c.k_rank = 6; });
  add("opt", [](auto& c) { c.family = "opt"; });
  add("opt_mixed", [](auto& c) {
    c.family = "opt", c.layers = 3, c.dense_key_layer = 1, c.dense_value_layer = 2;
    c.k_rank = c.hidden;
  });
  return all;
}

/// Every family, with factors in some linears, in all, and in none.
inline std::vector<Kind> family_kinds() {
  std::vector<Kind> all;
  for (std::string family :
       {"llama", "mistral", "opt", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text"}) {
    TinyConfig config;
    config.family = family;
    config.window = 11;
    config.bfloat16 = true;
    config.tied = family == "opt" || family.starts_with("gemma");
    config.all_low_rank = true;
    all.push_back({family + "_low_rank", config});
    config.all_low_rank = false;
    config.biases = family == "llama";
    config.heads = 4;
    config.head_dim = 12;  // half a head is no multiple of 8
    all.push_back({family + "_mixed", config});
    config.low_rank = false;
    config.kv_heads = 1;
    all.push_back({family + "_dense", config});
  }
  return all;
}

/// Every kind of norm, position, MLP and linear, in dimensions that no number of ranks
/// divides.
inline std::vector<Kind> rank_kinds(int heads) {
  std::vector<Kind> all;
  for (std::string family : {"llama", "opt", "qwen3", "olmo2", "gemma2", "qwen2"}) {
    TinyConfig config;
    config.family = family;
    config.window = 11;
    config.bfloat16 = true;
    config.tied = family == "opt" || family == "gemma2";
    config.heads = heads;
    config.head_dim = family == "opt" ? 48 / heads : 8;
    config.low_rank = family != "qwen2";
    config.all_low_rank = family == "opt" || family == "olmo2";
    config.biases = family == "llama";
    config.position_mean = 2.0f;
    all.push_back({family, config});
  }
  return all;
}

}  // namespace deinfer::test

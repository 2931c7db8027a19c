// Tiny models of every kind for ranks on CUDA devices.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cuda_engine_fixture.h"
#include "tiny_kinds.h"

namespace deinfer::test {

inline constexpr int kVocabulary = 97;

/// Every kind of norm, position, MLP and linear, in dimensions that no number of ranks divides.
inline std::vector<Kind> kinds(int heads) {
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

inline EngineConfig ranks_for(const TinyModel& model, int size, std::string_view plan) {
  EngineConfig config = config_for(model, "cuda");
  config.tensor_parallel_size = size;
  config.tensor_parallel_plan = plan;
  return config;
}

}  // namespace deinfer::test

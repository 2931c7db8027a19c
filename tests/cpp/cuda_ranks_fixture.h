// Ranks on CUDA devices.
#pragma once

#include <string_view>
#include <vector>

#include "cuda_engine_fixture.h"
#include "rank_group_fixture.h"

namespace deinfer::test {

inline constexpr int kVocabulary = 97;

inline EngineConfig ranks_for(const TinyModel& model, int size, std::string_view plan) {
  EngineConfig config = config_for(model, "cuda");
  config.tensor_parallel_size = size;
  config.tensor_parallel_plan = plan;
  return config;
}

/// The logits and the most likely tokens of a batch.
inline std::vector<float> step_results(RankGroup& ranks, const Batch& batch) {
  std::vector<float> got;
  const auto tokens = execute(ranks, batch, [&](TeamMember& member, int, int rows, float* logits) {
    if (member.id() == 0) got.assign(logits, logits + rows * kVocabulary);
  });
  got.insert(got.end(), tokens.begin(), tokens.end());
  return got;
}

}  // namespace deinfer::test

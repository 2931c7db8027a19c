// Ranks on CUDA devices.
#pragma once

#include <string_view>

#include "cuda_engine_fixture.h"

namespace deinfer::test {

inline constexpr int kVocabulary = 97;

inline EngineConfig ranks_for(const TinyModel& model, int size, std::string_view plan) {
  EngineConfig config = config_for(model, "cuda");
  config.tensor_parallel_size = size;
  config.tensor_parallel_plan = plan;
  return config;
}

}  // namespace deinfer::test

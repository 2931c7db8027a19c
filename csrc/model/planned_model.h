// A model's config as the planner sees it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "model/model_config.h"
#include "plan/cost_model.h"

namespace deinfer {

ModelShape model_shape(const ModelConfig& config);
KvTraits kv_traits(const ModelConfig& config);

struct NamedLinear {
  LinearRole role;
  std::string name;   // of its module
  LinearShape shape;  // with the rank of config.json
};

/// The linears of a layer, in the order in which they run.
std::vector<NamedLinear> layer_linears(const ModelConfig& config, int layer);

/// Throws kInvalidArgument for a rank of a module that the model lacks.
void check_ranks(const ModelConfig& config);

/// The shapes of all linears, with the ranks of config.json. `keep` in (0, 1] replaces those of the
/// layers by floor(keep n k / (n + k)), at least 1; 0 leaves them. `dtype`: "float32", "bfloat16"
/// or "int8" weights. Throws kInvalidArgument for a rank of a module that the model lacks, a `keep`
/// outside [0, 1] and an unknown dtype.
PlannedModel planned_model(const ModelConfig& config, double keep, std::string_view dtype);

}  // namespace deinfer

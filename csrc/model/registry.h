// The architectures that deinfer runs. To add one: a file with its parse function and a line in
// registry.cc.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "model/model_config.h"

namespace deinfer {

struct Architecture {
  std::string_view model_type;                         // of config.json
  ModelConfig (*parse)(const nlohmann::json& config);  // throws on what it cannot run
};

/// Throws kUnsupported naming the type and what there is.
const Architecture& find_architecture(std::string_view model_type);

/// Llama 1/2/3.x and models of the same structure.
ModelConfig parse_llama(const nlohmann::json& config);
ModelConfig parse_mistral(const nlohmann::json& config);
ModelConfig parse_olmo2(const nlohmann::json& config);
ModelConfig parse_opt(const nlohmann::json& config);
ModelConfig parse_qwen2(const nlohmann::json& config);
ModelConfig parse_qwen3(const nlohmann::json& config);

}  // namespace deinfer

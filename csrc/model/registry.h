// The architectures that deinfer runs. To add one: a file with its parse function and a line in
// registry.cc.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string_view>

#include "model/model_config.h"

namespace deinfer {

struct Architecture {
  std::string_view model_type;                         // of config.json
  ModelConfig (*parse)(const nlohmann::json& config);  // throws on what it cannot run
};

std::span<const Architecture> architectures();

/// Throws kUnsupported naming the type and what there is.
const Architecture& find_architecture(std::string_view model_type);

ModelConfig parse_gemma(const nlohmann::json& config);
ModelConfig parse_gemma2(const nlohmann::json& config);
/// The text models, and the text part of those that read images too.
ModelConfig parse_gemma3_text(const nlohmann::json& config);
ModelConfig parse_gemma3(const nlohmann::json& config);
/// Llama 1/2/3.x and models of the same structure.
ModelConfig parse_llama(const nlohmann::json& config);
ModelConfig parse_mistral(const nlohmann::json& config);
ModelConfig parse_ministral(const nlohmann::json& config);
ModelConfig parse_olmo2(const nlohmann::json& config);
ModelConfig parse_olmo3(const nlohmann::json& config);
ModelConfig parse_opt(const nlohmann::json& config);
ModelConfig parse_qwen2(const nlohmann::json& config);
ModelConfig parse_qwen3(const nlohmann::json& config);

}  // namespace deinfer

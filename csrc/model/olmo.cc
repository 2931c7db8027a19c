// OLMo 2: Llama with norms of what attention and MLP put out instead of what they read, and an
// RMSNorm over all heads of q and of k. OLMo 3: with a window in three of four layers, and a scaled
// rotation in the others.
#include <nlohmann/json.hpp>

#include "model/registry.h"

namespace deinfer {

namespace {

ModelConfig read_olmo(const nlohmann::json& config, bool has_rope_fields) {
  ModelConfig model =
      read_rotary_model(config, {.norm_eps = 1e-5, .has_rope_fields = has_rope_fields});
  model.qk_norm = QkNormKind::kFull;
  model.names.attention_norm.clear();
  model.names.attention_output_norm = "post_attention_layernorm";
  model.names.mlp_norm.clear();
  model.names.mlp_output_norm = "post_feedforward_layernorm";
  return model;
}

}  // namespace

ModelConfig parse_olmo2(const nlohmann::json& config) { return read_olmo(config, true); }

ModelConfig parse_olmo3(const nlohmann::json& config) {
  ModelConfig model = read_olmo(config, false);
  const double theta = json_number(config, "rope_theta", 500000.0);
  read_turning_kinds(config, theta, theta, [](int i) { return (i + 1) % 4 != 0; }, model);
  return model;
}

}  // namespace deinfer

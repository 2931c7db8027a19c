// OLMo 2: Llama with norms of what attention and MLP put out instead of what they read, and an
// RMSNorm over all heads of q and of k.
#include <nlohmann/json.hpp>

#include "model/registry.h"

namespace deinfer {

ModelConfig parse_olmo2(const nlohmann::json& config) {
  ModelConfig model = read_rotary_model(config, {.norm_eps = 1e-5});
  model.qk_norm = QkNormKind::kFull;
  model.names.attention_norm.clear();
  model.names.attention_output_norm = "post_attention_layernorm";
  model.names.mlp_norm.clear();
  model.names.mlp_output_norm = "post_feedforward_layernorm";
  return model;
}

}  // namespace deinfer

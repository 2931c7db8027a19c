// Gemma 1, 2 and 3 (text): RMSNorm with gain 1 + weight, scaled embeddings, an MLP gated by GELU.
// 2 and 3 also norm what blocks add and alternate layers with and without an attention window; 2
// caps scores and logits, 3 norms q and k and has a rotation of its own for windowed layers.
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "model/registry.h"

namespace deinfer {
namespace {

using nlohmann::json;

/// What all of them share; `defaults` beyond that.
ModelConfig read_gemma(const json& config, RotaryDefaults defaults) {
  defaults.head_dim = 256;
  defaults.tie_word_embeddings = true;
  defaults.mlp = MlpKind::kGatedGeluTanh;
  if (json_bool(config, "use_bidirectional_attention", false)) {
    fail(ErrorCode::kUnsupported,
         "config.json: use_bidirectional_attention=true is not supported; attention is causal");
  }
  ModelConfig model = read_rotary_model(config, defaults);
  model.norm_gain_offset = 1.0f;
  model.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(model.hidden_size)));
  return model;
}

/// Null stands for none, here 0.
float read_soft_cap(const json& config, const char* key, float fallback) {
  if (json_is_null(config, key)) return 0.0f;
  if (!config.contains(key)) return fallback;
  const auto cap = static_cast<float>(json_number(config, key, 0));
  check_argument(std::isfinite(cap) && cap > 0, "config.json: ", key, "=", cap,
                 " is not a positive number");
  return cap;
}

/// What 2 and 3 share, without the kinds of attention.
ModelConfig read_sandwich(const json& config, RotaryDefaults defaults, float logit_soft_cap) {
  defaults.activation_field = "hidden_activation";
  defaults.num_heads = 8;
  defaults.num_kv_heads = 4;
  ModelConfig model = read_gemma(config, defaults);
  const double scalar = json_number(config, "query_pre_attn_scalar", 256);
  check_argument(std::isfinite(scalar) && scalar > 0, "config.json: query_pre_attn_scalar=", scalar,
                 " must be positive");
  model.attention_scale = static_cast<float>(1.0 / std::sqrt(scalar));
  model.logit_soft_cap = read_soft_cap(config, "final_logit_softcapping", logit_soft_cap);
  model.names.attention_output_norm = "post_attention_layernorm";
  model.names.mlp_norm = "pre_feedforward_layernorm";
  model.names.mlp_output_norm = "post_feedforward_layernorm";
  return model;
}

}  // namespace

ModelConfig parse_gemma(const json& config) {
  json known = config;  // "gelu" is how the first releases say gelu_pytorch_tanh
  if (json_string(config, "hidden_act", "") == "gelu") known["hidden_act"] = "gelu_pytorch_tanh";
  return read_gemma(
      known,
      {.max_position_embeddings = 8192, .num_heads = 16, .num_kv_heads = 16, .vocab_size = 256000});
}

ModelConfig parse_gemma2(const json& config) {
  ModelConfig model =
      read_sandwich(config, {.max_position_embeddings = 8192, .vocab_size = 256000}, 30.0f);
  model.attention_soft_cap = read_soft_cap(config, "attn_logit_softcapping", 50.0f);
  AttentionKind full = model.attention[0];
  AttentionKind windowed = full;
  windowed.window = read_window(config);
  set_attention(model,
                read_windowed_layers(config, model.num_layers, [](int i) { return i % 2 == 0; }),
                windowed, full);
  return model;
}

ModelConfig parse_gemma3_text(const json& config) {
  ModelConfig model = read_sandwich(
      config, {.max_position_embeddings = 131072, .vocab_size = 262208, .has_rope_fields = false},
      0.0f);
  if (!json_is_null(config, "attn_logit_softcapping") &&
      config.contains("attn_logit_softcapping")) {
    fail(ErrorCode::kUnsupported,
         "config.json: attn_logit_softcapping=", config.at("attn_logit_softcapping").dump(),
         " is not supported for gemma3_text");
  }
  model.qk_norm = QkNormKind::kPerHead;
  const int pattern = json_int(config, "sliding_window_pattern", 1, 6);
  const double theta = json_number(config, "rope_theta", 1e6);
  read_turning_kinds(
      config, theta, json_number(config, "rope_local_base_freq", 1e4),
      [&](int i) { return (i + 1) % pattern != 0; }, model);
  return model;
}

ModelConfig parse_gemma3(const json& config) {
  check_argument(config.contains("text_config") && config.at("text_config").is_object(),
                 "config.json: text_config: expected an object, as a gemma3 model has");
  const json& text = config.at("text_config");
  const std::string type = json_string(text, "model_type", "gemma3_text");
  if (type != "gemma3_text") {
    fail(ErrorCode::kUnsupported, "config.json: text_config.model_type \"", type,
         "\" is not supported; supported is gemma3_text");
  }
  ModelConfig model = parse_gemma3_text(text);
  if (config.contains("tie_word_embeddings")) {
    model.tie_word_embeddings = json_bool(config, "tie_word_embeddings", true);
  }
  // As published, and as transformers writes them since 4.52.
  model.prefix_rules = {
      {"language_model.model.", "model."}, {"language_model.lm_head.", "lm_head."},
      {"model.language_model.", "model."}, {"vision_tower.", {}},
      {"multi_modal_projector.", {}},      {"model.vision_tower.", {}},
      {"model.multi_modal_projector.", {}}};
  return model;
}

}  // namespace deinfer

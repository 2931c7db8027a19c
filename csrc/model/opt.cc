// OPT: LayerNorm, learned positions, a plain MLP with ReLU, biases everywhere.
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "model/registry.h"

namespace deinfer {
namespace {

/// A field that is true in all OPT models but the 350M one.
void require_true(const nlohmann::json& config, const char* key) {
  if (json_bool(config, key, true)) return;
  fail(ErrorCode::kUnsupported, "config.json: ", key,
       "=false is not supported for opt; supported is true");
}

}  // namespace

ModelConfig parse_opt(const nlohmann::json& config) {
  ModelConfig model;
  model.hidden_size = json_int(config, "hidden_size", 1);
  model.intermediate_size = json_int(config, "ffn_dim", 1);
  model.num_layers = json_int(config, "num_hidden_layers", 1);
  model.num_heads = json_int(config, "num_attention_heads", 1);
  model.num_kv_heads = model.num_heads;
  model.head_dim = model.hidden_size / model.num_heads;
  model.vocab_size = json_int(config, "vocab_size", 1);
  model.max_position_embeddings = json_int(config, "max_position_embeddings", 1, 2048);
  model.norm = NormKind::kLayer;
  model.norm_eps = 1e-5f;
  model.mlp = MlpKind::kRelu;
  model.positions = PositionKind::kLearned;
  model.position_offset = 2;
  model.tie_word_embeddings = json_bool(config, "tie_word_embeddings", true);
  check_argument(model.hidden_size % model.num_heads == 0,
                 "config.json: hidden_size=", model.hidden_size,
                 " is not a multiple of num_attention_heads=", model.num_heads);
  require_true(config, "do_layer_norm_before");
  require_true(config, "layer_norm_elementwise_affine");
  int projection = json_int(config, "word_embed_proj_dim", 1, model.hidden_size);
  if (projection != model.hidden_size) {
    fail(ErrorCode::kUnsupported, "config.json: word_embed_proj_dim=", projection,
         " is not supported for opt; supported is hidden_size=", model.hidden_size);
  }
  std::string activation = json_string(config, "activation_function", "relu");
  if (activation != "relu") {
    fail(ErrorCode::kUnsupported, "config.json: activation_function \"", activation,
         "\" is not supported for opt; supported is relu");
  }
  ModuleNames& names = model.names;
  names.embedding = "model.decoder.embed_tokens";
  names.positions = "model.decoder.embed_positions";
  names.layers = "model.decoder.layers";
  names.final_norm = "model.decoder.final_layer_norm";
  if (json_bool(config, "_remove_final_layer_norm", false)) names.final_norm.clear();
  names.attention_norm = "self_attn_layer_norm";
  names.output = "self_attn.out_proj";
  names.mlp_norm = "final_layer_norm";
  names.up = "fc1";
  names.down = "fc2";
  return model;
}

}  // namespace deinfer

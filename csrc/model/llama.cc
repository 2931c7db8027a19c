// Llama: RMSNorm, rotary embedding, grouped-query attention, SiLU-gated MLP.
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "model/registry.h"

namespace deinfer {

ModelConfig parse_llama(const nlohmann::json& config) {
  ModelConfig model;
  model.hidden_size = json_int(config, "hidden_size", 1);
  model.intermediate_size = json_int(config, "intermediate_size", 1);
  model.num_layers = json_int(config, "num_hidden_layers", 1);
  model.num_heads = json_int(config, "num_attention_heads", 1);
  model.num_kv_heads = json_int(config, "num_key_value_heads", 1, model.num_heads);
  model.head_dim = json_int(config, "head_dim", 1, model.hidden_size / model.num_heads);
  model.vocab_size = json_int(config, "vocab_size", 1);
  model.max_position_embeddings = json_int(config, "max_position_embeddings", 1, 2048);
  model.rms_norm_eps = static_cast<float>(json_number(config, "rms_norm_eps", 1e-6));
  model.tie_word_embeddings = json_bool(config, "tie_word_embeddings", false);
  model.rope = read_rope_config(config, model.max_position_embeddings);
  check_argument(model.num_heads % model.num_kv_heads == 0,
                 "config.json: num_attention_heads=", model.num_heads,
                 " is not a multiple of num_key_value_heads=", model.num_kv_heads);
  check_argument(model.head_dim % 2 == 0 && model.head_dim > 0,
                 "config.json: head_dim=", model.head_dim, " must be even");
  check_argument(model.num_heads / model.num_kv_heads <= 64, "config.json: ", model.num_heads,
                 " heads on ", model.num_kv_heads, " kv heads: at most 64 heads may share one");
  std::string activation = json_string(config, "hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail(ErrorCode::kUnsupported, "config.json: hidden_act \"", activation,
         "\" is not supported for llama; supported is silu");
  }
  return model;
}

}  // namespace deinfer

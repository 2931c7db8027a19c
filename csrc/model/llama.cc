// Llama; Mistral, which adds a window of attention; Ministral, whose layers may differ in it.
#include <nlohmann/json.hpp>

#include "model/registry.h"

namespace deinfer {

ModelConfig parse_llama(const nlohmann::json& config) { return read_rotary_model(config); }

ModelConfig parse_mistral(const nlohmann::json& config) {
  ModelConfig model = read_rotary_model(config, {.max_position_embeddings = 4096 * 32});
  model.attention[0].window = read_window(config);
  return model;
}

ModelConfig parse_ministral(const nlohmann::json& config) {
  ModelConfig model = parse_mistral(config);
  AttentionKind windowed = model.attention[0];
  AttentionKind full = windowed;
  full.window = 0;
  set_attention(model, read_windowed_layers(config, model.num_layers, [](int) { return true; }),
                windowed, full);
  return model;
}

}  // namespace deinfer

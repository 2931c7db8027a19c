// Llama, and Mistral, which adds a window of attention.
#include <nlohmann/json.hpp>

#include "model/registry.h"

namespace deinfer {

ModelConfig parse_llama(const nlohmann::json& config) { return read_rotary_model(config); }

ModelConfig parse_mistral(const nlohmann::json& config) {
  ModelConfig model = read_rotary_model(config, {.max_position_embeddings = 4096 * 32});
  // null: no window. Without the field it has the size that version 0.1 was trained with.
  if (!json_is_null(config, "sliding_window")) {
    model.attention[0].window = json_int(config, "sliding_window", 1, 4096);
  }
  return model;
}

}  // namespace deinfer

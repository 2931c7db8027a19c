// Qwen2: Llama with biases of q, k and v. Qwen3: without them, with an RMSNorm of each head of q,
// k.
#include <nlohmann/json.hpp>

#include "model/registry.h"

namespace deinfer {
namespace {

constexpr int kMaxPositionEmbeddings = 32768;

/// The windows that use_sliding_window asks for: of the last layers, or of those that layer_types
/// (since transformers 4.53) says.
void read_windows(const nlohmann::json& config, ModelConfig& model) {
  if (!json_bool(config, "use_sliding_window", false)) return;
  const int first = json_int(config, "max_window_layers", 0, 28);
  AttentionKind full = model.attention[0];
  AttentionKind windowed = full;
  windowed.window = read_window(config);
  set_attention(model,
                read_windowed_layers(config, model.num_layers, [&](int i) { return i >= first; }),
                windowed, full);
}

}  // namespace

ModelConfig parse_qwen2(const nlohmann::json& config) {
  ModelConfig model =
      read_rotary_model(config, {.max_position_embeddings = kMaxPositionEmbeddings});
  read_windows(config, model);
  return model;
}

ModelConfig parse_qwen3(const nlohmann::json& config) {
  ModelConfig model = read_rotary_model(
      config, {.max_position_embeddings = kMaxPositionEmbeddings, .head_dim = 128});
  read_windows(config, model);
  model.qk_norm = QkNormKind::kPerHead;
  return model;
}

}  // namespace deinfer

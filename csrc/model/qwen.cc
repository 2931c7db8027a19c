// Qwen2: Llama with biases of q, k and v. Qwen3: without them, with an RMSNorm of each head of q,
// k.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "model/registry.h"

namespace deinfer {
namespace {

constexpr int kMaxPositionEmbeddings = 32768;

/// Layers that have a window when use_sliding_window is set: the last ones, or those that
/// layer_types (since transformers 4.53) says.
int count_windowed(const nlohmann::json& config, int num_layers) {
  if (!config.contains("layer_types") || !config.at("layer_types").is_array()) {
    return num_layers - std::min(num_layers, json_int(config, "max_window_layers", 0, 28));
  }
  const nlohmann::json& types = config.at("layer_types");
  return static_cast<int>(std::count(types.begin(), types.end(), "sliding_attention"));
}

/// The window of all layers, or 0. One for some layers only is not supported.
int read_window(const nlohmann::json& config, const ModelConfig& model) {
  if (!json_bool(config, "use_sliding_window", false)) return 0;
  if (config.contains("sliding_window") && config.at("sliding_window").is_null()) return 0;
  int window = json_int(config, "sliding_window", 1, 4096);
  int windowed = count_windowed(config, model.num_layers);
  if (windowed == 0 || window >= model.max_position_embeddings) return 0;
  if (windowed != model.num_layers) {
    fail(ErrorCode::kUnsupported, "config.json: use_sliding_window with sliding_window=", window,
         " in ", windowed, " of ", model.num_layers,
         " layers is not supported; supported is all or none");
  }
  return window;
}

}  // namespace

ModelConfig parse_qwen2(const nlohmann::json& config) {
  ModelConfig model =
      read_rotary_model(config, {.max_position_embeddings = kMaxPositionEmbeddings});
  model.sliding_window = read_window(config, model);
  return model;
}

ModelConfig parse_qwen3(const nlohmann::json& config) {
  ModelConfig model = read_rotary_model(
      config, {.max_position_embeddings = kMaxPositionEmbeddings, .head_dim = 128});
  model.sliding_window = read_window(config, model);
  model.qk_norm = QkNormKind::kPerHead;
  return model;
}

}  // namespace deinfer

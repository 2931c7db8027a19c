// What a decoder-only model looks like, as read from config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "deinfer/sampling_params.h"
#include "model/rope.h"
#include "plan/norms.h"

namespace deinfer {

enum class MlpKind : std::uint8_t {
  kGatedSilu,      // down(silu(gate(x)) * up(x))
  kGatedGeluTanh,  // down(gelu(gate(x)) * up(x)), gelu in its tanh form
  kRelu,           // down(max(up(x), 0))
};

constexpr bool is_gated(MlpKind kind) { return kind != MlpKind::kRelu; }

enum class PositionKind : std::uint8_t {
  kRotary,
  kLearned,  // a vector per position, added to the token's embedding
};

/// What the attention of a layer sees, and how its q and k are turned.
struct AttentionKind {
  int window = 0;   // positions a token sees, itself included; 0: all
  RopeConfig rope;  // of rotary positions
  bool operator==(const AttentionKind&) const = default;
};

/// What becomes of a tensor whose name starts with `prefix`.
struct PrefixRule {
  std::string prefix;
  std::optional<std::string> replacement;  // none: it is not part of the text model
};

/// Names of modules and norms in the checkpoint; the defaults are Llama's. An empty name: the model
/// has no such norm.
struct ModuleNames {
  std::string embedding = "model.embed_tokens";
  std::string positions;  // of learned ones
  std::string layers = "model.layers";
  std::string final_norm = "model.norm";
  std::string head = "lm_head";
  // Within a layer. A block is x + output_norm(block(norm(x))).
  std::string attention_norm = "input_layernorm";
  std::string attention_output_norm;
  std::string query = "self_attn.q_proj";
  std::string key = "self_attn.k_proj";
  std::string value = "self_attn.v_proj";
  std::string query_norm = "self_attn.q_norm";  // where qk_norm is not kNone
  std::string key_norm = "self_attn.k_norm";
  std::string output = "self_attn.o_proj";
  std::string mlp_norm = "post_attention_layernorm";
  std::string mlp_output_norm;
  std::string gate = "mlp.gate_proj";  // of a gated MLP
  std::string up = "mlp.up_proj";
  std::string down = "mlp.down_proj";
};

/// The differences between architectures are values here: the decoder runs them all. Biases are not
/// mentioned, as a linear has one when the checkpoint does.
struct ModelConfig {
  std::string model_type;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  NormKind norm = NormKind::kRms;
  float norm_eps = 1e-6f;
  QkNormKind qk_norm = QkNormKind::kNone;  // with rotary positions only
  MlpKind mlp = MlpKind::kGatedSilu;
  float norm_gain_offset = 0.0f;  // an RMSNorm's gain is its weight plus this
  PositionKind positions = PositionKind::kRotary;
  int position_offset = 0;  // rows of the table before that of position 0, of learned ones
  /// The kinds that layers have.
  std::vector<AttentionKind> attention = std::vector<AttentionKind>(1);
  std::vector<int> layer_attention;  // of each layer, the place of its kind; empty: all the first
  float attention_scale = 0.0f;      // of q . k; 0: 1 / sqrt(head_dim)
  float attention_soft_cap = 0.0f;   // scores s are cap * tanh(s / cap); 0: they are not
  float logit_soft_cap = 0.0f;       // likewise
  float embedding_scale = 1.0f;      // rounded to the activation type
  bool tie_word_embeddings = false;
  ModuleNames names;
  std::vector<PrefixRule> prefix_rules;      // of a checkpoint that holds more than the text model
  std::vector<TokenId> eos_token_ids;        // of config.json and generation_config.json
  std::map<std::string, int> lowrank_ranks;  // module name -> rank, from the low_rank object

  int attention_of(int layer) const {
    return layer_attention.empty() ? 0 : layer_attention[static_cast<std::size_t>(layer)];
  }
  /// What q . k is multiplied with.
  float score_scale() const;
  /// Whether what blocks add to the residual stream is normalised.
  bool has_output_norms() const {
    return !names.attention_output_norm.empty() || !names.mlp_output_norm.empty();
  }
  /// The rotations that kinds of attention have, each once; none with learned positions.
  std::vector<RopeConfig> distinct_ropes() const;
};

/// Reads config.json (and generation_config.json beside it) and lets the registered architecture
/// interpret it. `path` is a checkpoint directory or the config file itself. Throws
/// kInvalidArgument naming the field and its value, kUnsupported for an architecture or feature
/// that deinfer does not run.
ModelConfig read_model_config(const std::filesystem::path& path);

/// Field access that reports the field's name and what was found instead.
int json_int(const nlohmann::json& object, const char* key, int minimum);
int json_int(const nlohmann::json& object, const char* key, int minimum, int fallback);
double json_number(const nlohmann::json& object, const char* key, double fallback);
/// Whether the field is there and null, which stands for "none" where it has a default.
bool json_is_null(const nlohmann::json& object, const char* key);
bool json_bool(const nlohmann::json& object, const char* key, bool fallback);
std::string json_string(const nlohmann::json& object, const char* key, const char* fallback);

/// What config.json may leave out, and how the architecture names and fills its activation.
struct RotaryDefaults {
  int max_position_embeddings = 2048;
  double norm_eps = 1e-6;
  int num_heads = 0;     // 0: not to be left out
  int num_kv_heads = 0;  // 0: as many as heads
  int head_dim = 0;      // 0: hidden_size / num_attention_heads
  int vocab_size = 0;    // 0: not to be left out
  bool tie_word_embeddings = false;
  const char* activation_field = "hidden_act";
  MlpKind mlp = MlpKind::kGatedSilu;
  bool has_rope_fields = true;  // rope_theta and rope_parameters mean what they do for Llama
};

/// The fields that Llama and its relatives share: RMSNorm, rotary positions, grouped-query
/// attention, gated MLP, Llama's names.
ModelConfig read_rotary_model(const nlohmann::json& config, const RotaryDefaults& defaults = {});

/// A rope_parameters or rope_scaling object; `theta` where it has none. Null is an empty object.
RopeConfig read_rope_object(const nlohmann::json& object, double theta,
                            int max_position_embeddings);

/// Whether each layer has a window: as layer_types says, or `fallback` where there is none.
std::vector<bool> read_windowed_layers(const nlohmann::json& config, int num_layers,
                                       const std::function<bool(int layer)>& fallback);

/// sliding_window, 4096 if it is left out; 0: null, for none.
int read_window(const nlohmann::json& config);

/// Gives layers one of two kinds of attention. A window that no sequence outgrows is none.
void set_attention(ModelConfig& model, const std::vector<bool>& is_windowed, AttentionKind windowed,
                   AttentionKind full);

/// The attention of models whose layers with and without a window turn q and k differently:
/// rope_parameters of each layer type, or rope_scaling of the layers without a window; the thetas
/// where these have none.
void read_turning_kinds(const nlohmann::json& config, double theta, double windowed_theta,
                        const std::function<bool(int layer)>& has_window, ModelConfig& model);

/// Throws kInvalidArgument unless the numbers of heads fit each other and the kernels.
void check_heads(const ModelConfig& model);

/// rope_parameters (transformers 5) or rope_scaling and rope_theta (before).
RopeConfig read_rope_config(const nlohmann::json& config, int max_position_embeddings);

}  // namespace deinfer

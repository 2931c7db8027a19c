#include "tiny_model.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/bf16.h"

namespace deinfer::test {

TinyModel::TinyModel(const TinyConfig& config, std::uint32_t seed) : config_(config) {
  random_.seed(seed);
  if (config.family == "opt") {
    add_opt();
  } else {
    add_rotary();
  }
  json_["model_type"] = (config.low_rank ? "lowrank_" : "") + config.family;
  if (config.low_rank) {
    json_["low_rank"] = {{"version", 1}, {"base_model_type", config.family}, {"ranks", ranks_}};
  }
  write();
}

TinyModel::~TinyModel() = default;

void TinyModel::write() const {
  std::ofstream(directory_.path() / "config.json") << json_.dump(2);
  nlohmann::json header;
  std::string data;
  for (const auto& [name, tensor] : tensors_) {
    std::size_t begin = data.size();
    for (float value : tensor.values) {
      if (config_.bfloat16) {
        bf16 rounded = to_bf16(value);
        data.append(reinterpret_cast<const char*>(&rounded), sizeof rounded);
      } else {
        data.append(reinterpret_cast<const char*>(&value), sizeof value);
      }
    }
    header[name] = {{"dtype", config_.bfloat16 ? "BF16" : "F32"},
                    {"shape", tensor.shape},
                    {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  auto length = static_cast<std::uint64_t>(text.size());
  std::ofstream file(weights_file(), std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), sizeof length);
  file << text << data;
}

void TinyModel::add_rotary() {
  const TinyConfig& c = config_;
  bool olmo2 = c.family == "olmo2";
  bool sandwich = c.family == "gemma2" || c.family == "gemma3_text";
  bool biases = c.biases || c.family == "qwen2";
  add("model.embed_tokens.weight", {c.vocab, c.hidden}, 1.0f);
  if (c.vocab_period > 0) repeat_rows(tensors_["model.embed_tokens.weight"]);
  add_norm("model.norm", c.hidden);
  if (!c.tied) add("lm_head.weight", {c.vocab, c.hidden}, 0.5f);
  int q = c.heads * c.head_dim;
  int kv = c.kv_heads * c.head_dim;
  for (int i = 0; i < c.layers; ++i) {
    std::string prefix = "model.layers." + std::to_string(i) + ".";
    add_norm(prefix + (olmo2 ? "post_attention_layernorm" : "input_layernorm"), c.hidden);
    add_norm(prefix + (olmo2 ? "post_feedforward_layernorm" : "post_attention_layernorm"),
             c.hidden);
    if (sandwich) {
      add_norm(prefix + "pre_feedforward_layernorm", c.hidden);
      add_norm(prefix + "post_feedforward_layernorm", c.hidden);
    }
    if (olmo2 || c.family == "qwen3" || c.family == "gemma3_text") {
      add_norm(prefix + "self_attn.q_norm", olmo2 ? q : c.head_dim);
      add_norm(prefix + "self_attn.k_norm", olmo2 ? kv : c.head_dim);
    }
    add_linear(prefix + "self_attn.q_proj", q, c.hidden, c.low_rank ? 7 : 0, biases);
    add_linear(prefix + "self_attn.k_proj", kv, c.hidden, key_rank(i), biases);
    add_linear(prefix + "self_attn.v_proj", kv, c.hidden, value_rank(i), biases);
    add_linear(prefix + "self_attn.o_proj", c.hidden, q, c.low_rank ? 17 + i : 0, c.biases);
    auto mlp_rank = [&](int usual) { return c.mlp_rank > 0 ? c.mlp_rank : usual; };
    add_linear(prefix + "mlp.gate_proj", c.intermediate, c.hidden, mlp_rank(c.low_rank ? 33 : 0),
               c.biases);
    add_linear(prefix + "mlp.up_proj", c.intermediate, c.hidden,
               mlp_rank(c.all_low_rank ? 20 + i : 0), c.biases);
    add_linear(prefix + "mlp.down_proj", c.hidden, c.intermediate, mlp_rank(c.low_rank ? 1 + i : 0),
               c.biases);
  }
  json_ = {{"hidden_size", c.hidden},
           {"intermediate_size", c.intermediate},
           {"num_hidden_layers", c.layers},
           {"num_attention_heads", c.heads},
           {"num_key_value_heads", c.kv_heads},
           {"head_dim", c.head_dim},
           {"vocab_size", c.vocab},
           {"max_position_embeddings", c.max_position},
           {"rms_norm_eps", 1e-5},
           {"rope_theta", 10000.0},
           {"tie_word_embeddings", c.tied},
           {"eos_token_id", 2}};
  if (sandwich) {
    json_["layer_types"] = nlohmann::json::array();
    for (int i = 0; i < c.layers; ++i) {
      json_["layer_types"].push_back(i % 2 == 0 ? "sliding_attention" : "full_attention");
    }
    json_["query_pre_attn_scalar"] = 12;
  }
  if (c.family == "gemma3_text") json_["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8}};
  if (c.family == "mistral" || sandwich) {
    json_["sliding_window"] = c.window > 0 ? nlohmann::json(c.window) : nlohmann::json();
  }
}

void TinyModel::add_opt() {
  const TinyConfig& c = config_;
  add("model.decoder.embed_tokens.weight", {c.vocab, c.hidden}, 1.0f);
  add("model.decoder.embed_positions.weight", {c.max_position + 2, c.hidden}, 0.5f);
  for (float& value : tensors_["model.decoder.embed_positions.weight"].values) {
    value += c.position_mean;
  }
  add_norm("model.decoder.final_layer_norm", c.hidden, true);
  for (int i = 0; i < c.layers; ++i) {
    std::string prefix = "model.decoder.layers." + std::to_string(i) + ".";
    std::string attention = prefix + "self_attn.";
    add_norm(prefix + "self_attn_layer_norm", c.hidden, true);
    add_norm(prefix + "final_layer_norm", c.hidden, true);
    add_linear(attention + "q_proj", c.hidden, c.hidden, c.low_rank ? 7 : 0, true);
    add_linear(attention + "k_proj", c.hidden, c.hidden, key_rank(i), true);
    add_linear(attention + "v_proj", c.hidden, c.hidden, value_rank(i), true);
    add_linear(attention + "out_proj", c.hidden, c.hidden, c.low_rank ? 17 + i : 0, true);
    add_linear(prefix + "fc1", c.intermediate, c.hidden, c.low_rank ? 33 : 0, true);
    add_linear(prefix + "fc2", c.hidden, c.intermediate, c.low_rank ? 1 + i : 0, true);
  }
  json_ = {{"hidden_size", c.hidden},
           {"word_embed_proj_dim", c.hidden},
           {"ffn_dim", c.intermediate},
           {"num_hidden_layers", c.layers},
           {"num_attention_heads", c.heads},
           {"vocab_size", c.vocab},
           {"max_position_embeddings", c.max_position},
           {"activation_function", "relu"},
           {"tie_word_embeddings", true},
           {"eos_token_id", 2}};
}

void TinyModel::add(const std::string& name, std::vector<int> shape, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  Tensor& tensor = tensors_[name];
  tensor.shape = std::move(shape);
  std::size_t count = 1;
  for (int extent : tensor.shape) count *= static_cast<std::size_t>(extent);
  for (std::size_t i = 0; i < count; ++i) tensor.values.push_back(normal(random_));
}

void TinyModel::repeat_rows(Tensor& tensor) const {
  auto period = static_cast<std::size_t>(config_.vocab_period * tensor.shape[1]);
  for (std::size_t i = period; i < tensor.values.size(); ++i) {
    tensor.values[i] = tensor.values[i - period];
  }
}

void TinyModel::add_norm(const std::string& name, int n, bool bias) {
  add(name + ".weight", {n}, 0.2f);
  const bool centered = config_.family.starts_with("gemma");  // the gain is 1 + weight
  for (float& value : tensors_[name + ".weight"].values) value += centered ? 0.0f : 1.0f;
  if (bias) add(name + ".bias", {n}, 0.2f);
}

void TinyModel::add_linear(const std::string& name, int n, int k, int rank, bool bias) {
  auto deviation = [](int fan_in) { return 1.0f / std::sqrt(static_cast<float>(fan_in)); };
  if (rank == 0) {
    add(name + ".weight", {n, k}, deviation(k));
  } else {
    add(name + ".v.weight", {rank, k}, deviation(k));
    add(name + ".u.weight", {n, rank}, deviation(rank));
    ranks_[name] = rank;
  }
  if (bias) add(name + (rank == 0 ? ".bias" : ".u.bias"), {n}, 0.3f);
}

}  // namespace deinfer::test

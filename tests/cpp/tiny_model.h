// Tiny random Llama checkpoints, written to a directory that disappears with the object.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "base/bf16.h"

namespace deinfer::test {

/// A directory of its own below the system's temporary one.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "deinfer-test-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

struct TinyConfig {
  int vocab = 97;
  int hidden = 48;
  int intermediate = 80;
  int layers = 2;
  int heads = 6;
  int kv_heads = 2;
  int head_dim = 8;
  int max_position = 256;
  bool tied = true;
  bool bfloat16 = false;
  bool low_rank = true;       // q, o, gate and down decomposed with odd ranks; k, v, up dense
  bool all_low_rank = false;  // k, v and up too
  int mlp_rank = 0;           // of gate, up and down, where not 0
  bool biases = false;        // of all linears of the layers
  int vocab_period = 0;       // of an embedding whose rows repeat; 0: they do not
};

class TinyModel {
 public:
  explicit TinyModel(const TinyConfig& config = {}, std::uint32_t seed = 1) : config_(config) {
    random_.seed(seed);
    add("model.embed_tokens.weight", {config.vocab, config.hidden}, 1.0f);
    if (config.vocab_period > 0) repeat_rows(tensors_["model.embed_tokens.weight"]);
    add_norm("model.norm.weight");
    if (!config.tied) add("lm_head.weight", {config.vocab, config.hidden}, 0.5f);
    int q = config.heads * config.head_dim;
    int kv = config.kv_heads * config.head_dim;
    for (int i = 0; i < config.layers; ++i) {
      std::string prefix = "model.layers." + std::to_string(i) + ".";
      add_norm(prefix + "input_layernorm.weight");
      add_norm(prefix + "post_attention_layernorm.weight");
      add_linear(prefix + "self_attn.q_proj", q, config.hidden, config.low_rank ? 7 : 0);
      add_linear(prefix + "self_attn.k_proj", kv, config.hidden, config.all_low_rank ? 5 : 0);
      add_linear(prefix + "self_attn.v_proj", kv, config.hidden, config.all_low_rank ? 18 : 0);
      add_linear(prefix + "self_attn.o_proj", config.hidden, q, config.low_rank ? 17 + i : 0);
      add_linear(prefix + "mlp.gate_proj", config.intermediate, config.hidden,
                 config.mlp_rank > 0 ? config.mlp_rank
                 : config.low_rank   ? 33
                                     : 0);
      add_linear(prefix + "mlp.up_proj", config.intermediate, config.hidden,
                 config.mlp_rank > 0   ? config.mlp_rank
                 : config.all_low_rank ? 20 + i
                                       : 0);
      add_linear(prefix + "mlp.down_proj", config.hidden, config.intermediate,
                 config.mlp_rank > 0 ? config.mlp_rank
                 : config.low_rank   ? 1 + i
                                     : 0);
    }
    json_ = {{"model_type", config.low_rank ? "lowrank_llama" : "llama"},
             {"hidden_size", config.hidden},
             {"intermediate_size", config.intermediate},
             {"num_hidden_layers", config.layers},
             {"num_attention_heads", config.heads},
             {"num_key_value_heads", config.kv_heads},
             {"head_dim", config.head_dim},
             {"vocab_size", config.vocab},
             {"max_position_embeddings", config.max_position},
             {"rms_norm_eps", 1e-5},
             {"rope_theta", 10000.0},
             {"tie_word_embeddings", config.tied},
             {"eos_token_id", 2}};
    if (config.low_rank) {
      json_["low_rank"] = {{"version", 1}, {"base_model_type", "llama"}, {"ranks", ranks_}};
    }
    write();
  }

  std::string path() const { return directory_.path().string(); }
  std::filesystem::path weights_file() const { return directory_.path() / "model.safetensors"; }
  nlohmann::json& json() { return json_; }
  /// Writes config.json and model.safetensors as they are now.
  void write() const {
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

 private:
  struct Tensor {
    std::vector<int> shape;
    std::vector<float> values;
  };

  void add(const std::string& name, std::vector<int> shape, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    Tensor& tensor = tensors_[name];
    tensor.shape = std::move(shape);
    std::size_t count = 1;
    for (int extent : tensor.shape) count *= static_cast<std::size_t>(extent);
    for (std::size_t i = 0; i < count; ++i) tensor.values.push_back(normal(random_));
  }
  void repeat_rows(Tensor& tensor) const {
    auto period = static_cast<std::size_t>(config_.vocab_period * tensor.shape[1]);
    for (std::size_t i = period; i < tensor.values.size(); ++i) {
      tensor.values[i] = tensor.values[i - period];
    }
  }
  void add_norm(const std::string& name) {
    add(name, {config_.hidden}, 0.2f);
    for (float& value : tensors_[name].values) value += 1.0f;
  }
  void add_linear(const std::string& name, int n, int k, int rank) {
    if (config_.biases) add(name + ".bias", {n}, 0.5f);
    auto deviation = [](int fan_in) { return 1.0f / std::sqrt(static_cast<float>(fan_in)); };
    if (rank == 0) {
      add(name + ".weight", {n, k}, deviation(k));
    } else {
      add(name + ".v.weight", {rank, k}, deviation(k));
      add(name + ".u.weight", {n, rank}, deviation(rank));
      ranks_[name] = rank;
    }
  }

  TinyConfig config_;
  TemporaryDirectory directory_;
  std::mt19937 random_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, int> ranks_;
  nlohmann::json json_;
};

}  // namespace deinfer::test

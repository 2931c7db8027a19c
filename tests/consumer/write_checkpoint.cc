// Writes a tiny random Llama checkpoint with low-rank linears, so that hosts need no Python.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr int kVocabulary = 64;
constexpr int kHidden = 32;
constexpr int kIntermediate = 48;
constexpr int kLayers = 2;
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kHeadDim = 8;
constexpr int kRank = 11;

class Safetensors {
 public:
  void add(const std::string& name, int rows, int cols) {
    std::size_t begin = data_.size();
    std::normal_distribution<float> normal(0.0f, 0.1f);
    for (int i = 0; i < rows * cols; ++i) data_.push_back(normal(random_));
    describe(name, "[" + std::to_string(rows) + "," + std::to_string(cols) + "]", begin);
  }
  void add_gain(const std::string& name) {
    std::size_t begin = data_.size();
    data_.insert(data_.end(), kHidden, 1.0f);
    describe(name, "[" + std::to_string(kHidden) + "]", begin);
  }
  void add_lowrank(const std::string& name, int out, int in) {
    add(name + ".v.weight", kRank, in);
    add(name + ".u.weight", out, kRank);
    ranks_ += (ranks_.empty() ? "\"" : ",\"") + name + "\":" + std::to_string(kRank);
  }
  const std::string& ranks() const { return ranks_; }
  void write(const std::filesystem::path& path) const {
    std::string header = "{" + header_ + "}";
    auto length = static_cast<std::uint64_t>(header.size());
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << header;
    file.write(reinterpret_cast<const char*>(data_.data()),
               static_cast<std::streamsize>(data_.size() * sizeof(float)));
  }

 private:
  void describe(const std::string& name, const std::string& shape, std::size_t begin) {
    header_ += (header_.empty() ? "\"" : ",\"") + name +
               "\":{\"dtype\":\"F32\",\"shape\":" + shape + ",\"data_offsets\":[" +
               std::to_string(begin * sizeof(float)) + "," +
               std::to_string(data_.size() * sizeof(float)) + "]}";
  }

  std::mt19937 random_{7};
  std::string header_;
  std::string ranks_;
  std::vector<float> data_;
};

}  // namespace

int main(int, char** argv) {
  std::filesystem::path directory = argv[1];
  std::filesystem::create_directories(directory);
  Safetensors weights;
  weights.add("model.embed_tokens.weight", kVocabulary, kHidden);
  weights.add_gain("model.norm.weight");
  for (int i = 0; i < kLayers; ++i) {
    std::string layer = "model.layers." + std::to_string(i) + ".";
    weights.add_gain(layer + "input_layernorm.weight");
    weights.add_gain(layer + "post_attention_layernorm.weight");
    weights.add_lowrank(layer + "self_attn.q_proj", kHeads * kHeadDim, kHidden);
    weights.add_lowrank(layer + "self_attn.k_proj", kKvHeads * kHeadDim, kHidden);
    weights.add(layer + "self_attn.v_proj.weight", kKvHeads * kHeadDim, kHidden);
    weights.add_lowrank(layer + "self_attn.o_proj", kHidden, kHeads * kHeadDim);
    weights.add_lowrank(layer + "mlp.gate_proj", kIntermediate, kHidden);
    weights.add_lowrank(layer + "mlp.up_proj", kIntermediate, kHidden);
    weights.add_lowrank(layer + "mlp.down_proj", kHidden, kIntermediate);
  }
  weights.write(directory / "model.safetensors");
  std::ofstream config(directory / "config.json");
  for (const std::pair<const char*, int>& field :
       {std::pair{"{\"vocab_size\":", kVocabulary}, std::pair{",\"hidden_size\":", kHidden},
        std::pair{",\"intermediate_size\":", kIntermediate},
        std::pair{",\"num_hidden_layers\":", kLayers},
        std::pair{",\"num_attention_heads\":", kHeads},
        std::pair{",\"num_key_value_heads\":", kKvHeads}, std::pair{",\"head_dim\":", kHeadDim},
        std::pair{",\"max_position_embeddings\":", 256}}) {
    config << field.first << field.second;
  }
  config
      << R"(,"model_type":"lowrank_llama","rms_norm_eps":1e-5,"tie_word_embeddings":true,)"
      << R"("hidden_act":"silu","eos_token_id":63,"low_rank":{"version":1,"base_model_type":"llama","ranks":{)"
      << weights.ranks() << "}}}";
  return config.good() ? 0 : 1;
}

// Tiny random checkpoints of every architecture, written to a directory that disappears with the
// object.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

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
  std::string family = "llama";  // a model_type
  int vocab = 97;
  int hidden = 48;
  int intermediate = 80;
  int layers = 2;
  int heads = 6;
  int kv_heads = 2;  // opt: as many as heads
  int head_dim = 8;
  int max_position = 256;
  int window = 0;              // mistral; gemma2, gemma3_text: of every second layer
  float position_mean = 0.0f;  // opt: of the position embeddings, so of the residual stream
  bool tied = true;
  bool bfloat16 = false;
  bool low_rank = true;       // q, o, gate and down decomposed with odd ranks; k, v, up dense
  bool all_low_rank = false;  // k, v and up too
  int k_rank = 5;             // then
  int v_rank = 18;
  int dense_key_layer = -1;  // of it k stays dense all the same
  int dense_value_layer = -1;
  int mlp_rank = 0;      // of gate, up and down, where not 0
  bool biases = false;   // of all linears of the layers
  int vocab_period = 0;  // of an embedding whose rows repeat; 0: they do not
};

class TinyModel {
 public:
  explicit TinyModel(const TinyConfig& config = {}, std::uint32_t seed = 1);
  ~TinyModel();

  std::string path() const { return directory_.path().string(); }
  std::filesystem::path weights_file() const { return directory_.path() / "model.safetensors"; }
  nlohmann::json& json() { return json_; }
  /// Writes config.json and model.safetensors as they are now.
  void write() const;

 private:
  struct Tensor {
    std::vector<int> shape;
    std::vector<float> values;
  };

  int key_rank(int layer) const {
    return config_.all_low_rank && layer != config_.dense_key_layer ? config_.k_rank : 0;
  }
  int value_rank(int layer) const {
    return config_.all_low_rank && layer != config_.dense_value_layer ? config_.v_rank : 0;
  }

  /// Llama, and what differs in its relatives.
  void add_rotary();
  void add_opt();

  void add(const std::string& name, std::vector<int> shape, float scale);
  void repeat_rows(Tensor& tensor) const;
  void add_norm(const std::string& name, int n, bool bias = false);
  void add_linear(const std::string& name, int n, int k, int rank, bool bias = false);

  TinyConfig config_;
  TemporaryDirectory directory_;
  std::mt19937 random_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, int> ranks_;
  nlohmann::json json_;
};

}  // namespace deinfer::test

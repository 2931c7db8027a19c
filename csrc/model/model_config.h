// What a decoder-only model looks like, as read from config.json.
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "deinfer/sampling_params.h"
#include "model/rope.h"

namespace deinfer {

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
  float rms_norm_eps = 1e-6f;
  bool tie_word_embeddings = false;
  RopeConfig rope;
  std::vector<TokenId> eos_token_ids;        // of config.json and generation_config.json
  std::map<std::string, int> lowrank_ranks;  // module name -> rank, from the low_rank object
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
bool json_bool(const nlohmann::json& object, const char* key, bool fallback);
std::string json_string(const nlohmann::json& object, const char* key, const char* fallback);

/// rope_parameters (transformers 5) or rope_scaling and rope_theta (before).
RopeConfig read_rope_config(const nlohmann::json& config, int max_position_embeddings);

}  // namespace deinfer

#include "model/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "io/json_file.h"
#include "model/registry.h"

namespace deinfer {
namespace {

using nlohmann::json;

bool has(const json& object, const char* key) {
  return object.contains(key) && !object.at(key).is_null();
}

[[noreturn]] void bad_field(const json& object, const char* key, const std::string& expected) {
  fail(ErrorCode::kInvalidArgument, "config.json: ", key, ": expected ", expected, ", found ",
       object.contains(key) ? object.at(key).dump() : std::string("nothing"));
}

const json& object_or_null(const json& object, const char* key) {
  static const json null;
  if (!has(object, key)) return null;
  if (!object.at(key).is_object()) bad_field(object, key, "an object");
  return object.at(key);
}

void append_token_ids(const json& config, const char* key, std::vector<TokenId>& ids) {
  if (!has(config, key)) return;
  json values = config.at(key).is_array() ? config.at(key) : json::array({config.at(key)});
  for (const json& value : values) {
    if (!value.is_number_integer()) bad_field(config, key, "a token id or a list of them");
    auto id = value.get<TokenId>();
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

void read_low_rank(const json& config, ModelConfig& model) {
  if (!has(config, "low_rank")) return;
  const json& low_rank = config.at("low_rank");
  if (!low_rank.is_object()) bad_field(config, "low_rank", "an object");
  int version = json_int(low_rank, "version", 1);
  if (version != 1) {
    fail(ErrorCode::kUnsupported, "config.json: low_rank.version is ", version,
         ", this deinfer reads version 1");
  }
  if (!has(low_rank, "ranks") || !low_rank.at("ranks").is_object()) {
    bad_field(low_rank, "ranks", "an object of module names and ranks");
  }
  for (const auto& [name, rank] : low_rank.at("ranks").items()) {
    model.lowrank_ranks[name] = json_int(low_rank.at("ranks"), name.c_str(), 1);
  }
}

}  // namespace

int json_int(const json& object, const char* key, int minimum) {
  std::string expected = str_cat("an integer >= ", minimum);
  if (!has(object, key) || !object.at(key).is_number_integer()) bad_field(object, key, expected);
  if (object.at(key).is_number_unsigned() &&
      object.at(key).get<std::uint64_t>() > std::numeric_limits<int>::max()) {
    bad_field(object, key, expected);
  }
  auto value = object.at(key).get<std::int64_t>();
  if (value < minimum) bad_field(object, key, expected);
  return static_cast<int>(value);
}

int json_int(const json& object, const char* key, int minimum, int fallback) {
  return has(object, key) ? json_int(object, key, minimum) : fallback;
}

double json_number(const json& object, const char* key, double fallback) {
  if (!has(object, key)) return fallback;
  if (!object.at(key).is_number()) bad_field(object, key, "a number");
  return object.at(key).get<double>();
}

bool json_bool(const json& object, const char* key, bool fallback) {
  if (!has(object, key)) return fallback;
  if (!object.at(key).is_boolean()) bad_field(object, key, "true or false");
  return object.at(key).get<bool>();
}

std::string json_string(const json& object, const char* key, const char* fallback) {
  if (!has(object, key)) return fallback;
  if (!object.at(key).is_string()) bad_field(object, key, "a string");
  return object.at(key).get<std::string>();
}

bool json_is_null(const json& object, const char* key) {
  return object.contains(key) && object.at(key).is_null();
}

RopeConfig read_rope_object(const json& object, double theta, int max_position_embeddings) {
  RopeConfig rope;
  rope.theta = theta;
  if (!object.is_null()) {
    for (const char* layer_type : {"full_attention", "sliding_attention"}) {
      if (object.contains(layer_type)) {
        fail(ErrorCode::kUnsupported, "config.json: rope_parameters of each layer type (",
             layer_type, ") are not supported for this model_type");
      }
    }
    rope.type = json_string(object, "rope_type", json_string(object, "type", "default").c_str());
    rope.theta = json_number(object, "rope_theta", rope.theta);
    rope.original_max_position =
        json_int(object, "original_max_position_embeddings", 1, max_position_embeddings);
    rope.factor =
        json_number(object, "factor",
                    rope.type == "yarn" || rope.type == "longrope"
                        ? static_cast<double>(max_position_embeddings) / rope.original_max_position
                        : 1.0);
    rope.low_freq_factor = json_number(object, "low_freq_factor", rope.low_freq_factor);
    rope.high_freq_factor = json_number(object, "high_freq_factor", rope.high_freq_factor);
    rope.beta_fast = json_number(object, "beta_fast", rope.beta_fast);
    rope.beta_slow = json_number(object, "beta_slow", rope.beta_slow);
    rope.mscale = json_number(object, "mscale", rope.mscale);
    rope.mscale_all_dim = json_number(object, "mscale_all_dim", rope.mscale_all_dim);
    rope.truncate = json_bool(object, "truncate", rope.truncate);
    if (has(object, "attention_factor")) {
      rope.attention_factor = json_number(object, "attention_factor", 1.0);
    }
    for (auto [name, list] : {std::pair{"short_factor", &rope.short_factor},
                              std::pair{"long_factor", &rope.long_factor}}) {
      if (!has(object, name)) continue;
      if (!object.at(name).is_array()) bad_field(object, name, "a list of numbers");
      for (const json& value : object.at(name)) {
        if (!value.is_number()) bad_field(object, name, "a list of numbers");
        list->push_back(value.get<double>());
      }
    }
  }
  check_argument(std::isfinite(rope.theta) && rope.theta > 0,
                 "config.json: rope_theta must be positive, got ", rope.theta);
  check_argument(std::isfinite(rope.factor) && rope.factor > 0,
                 "config.json: rope factor must be positive, got ", rope.factor);
  return rope;
}

ModelConfig read_rotary_model(const json& config, const RotaryDefaults& defaults) {
  auto int_or = [&](const char* key, int fallback) {
    return fallback > 0 ? json_int(config, key, 1, fallback) : json_int(config, key, 1);
  };
  ModelConfig model;
  model.hidden_size = json_int(config, "hidden_size", 1);
  model.intermediate_size = json_int(config, "intermediate_size", 1);
  model.num_layers = json_int(config, "num_hidden_layers", 1);
  model.num_heads = int_or("num_attention_heads", defaults.num_heads);
  model.num_kv_heads = int_or("num_key_value_heads",
                              defaults.num_kv_heads > 0 ? defaults.num_kv_heads : model.num_heads);
  int head_dim = defaults.head_dim > 0 ? defaults.head_dim : model.hidden_size / model.num_heads;
  model.head_dim = json_int(config, "head_dim", 1, head_dim);
  model.vocab_size = int_or("vocab_size", defaults.vocab_size);
  model.max_position_embeddings =
      json_int(config, "max_position_embeddings", 1, defaults.max_position_embeddings);
  model.norm_eps = static_cast<float>(json_number(config, "rms_norm_eps", defaults.norm_eps));
  model.tie_word_embeddings =
      json_bool(config, "tie_word_embeddings", defaults.tie_word_embeddings);
  if (defaults.has_rope_fields) {
    const char* key = has(config, "rope_parameters") ? "rope_parameters" : "rope_scaling";
    model.attention[0].rope = read_rope_object(
        object_or_null(config, key), json_number(config, "rope_theta", RopeConfig{}.theta),
        model.max_position_embeddings);
  }
  check_argument(model.head_dim % 2 == 0 && model.head_dim > 0,
                 "config.json: head_dim=", model.head_dim, " must be even");
  check_heads(model);
  model.mlp = defaults.mlp;
  const bool silu = model.mlp == MlpKind::kGatedSilu;
  const char* supported = silu ? "silu" : "gelu_pytorch_tanh";
  std::string activation = json_string(config, defaults.activation_field, supported);
  if (activation != supported && !(silu && activation == "swish")) {
    fail(ErrorCode::kUnsupported, "config.json: ", defaults.activation_field, " \"", activation,
         "\" is not supported for ", json_string(config, "model_type", ""), "; supported is ",
         supported);
  }
  return model;
}

std::vector<bool> read_windowed_layers(const json& config, int num_layers,
                                       const std::function<bool(int layer)>& fallback) {
  std::vector<bool> windowed;
  if (!has(config, "layer_types")) {
    for (int i = 0; i < num_layers; ++i) windowed.push_back(fallback(i));
    return windowed;
  }
  const json& types = config.at("layer_types");
  if (!types.is_array() || types.size() != static_cast<std::size_t>(num_layers)) {
    bad_field(config, "layer_types", str_cat("a list of ", num_layers, " types"));
  }
  for (const json& type : types) {
    if (type != "sliding_attention" && type != "full_attention") {
      fail(ErrorCode::kUnsupported, "config.json: layer_types: ", type.dump(),
           " is not supported; supported are full_attention, sliding_attention");
    }
    windowed.push_back(type == "sliding_attention");
  }
  return windowed;
}

void set_attention(ModelConfig& model, const std::vector<bool>& is_windowed, AttentionKind windowed,
                   AttentionKind full) {
  if (windowed.window >= model.max_position_embeddings) windowed.window = 0;
  const auto number = std::count(is_windowed.begin(), is_windowed.end(), true);
  const bool all = number == static_cast<std::ptrdiff_t>(is_windowed.size());
  model.layer_attention.clear();
  if (all || number == 0 || windowed == full) {
    model.attention = {all ? std::move(windowed) : std::move(full)};
    return;
  }
  model.attention = {std::move(windowed), std::move(full)};
  for (bool has_window : is_windowed) model.layer_attention.push_back(has_window ? 0 : 1);
}

int read_window(const json& config) {
  return json_is_null(config, "sliding_window") ? 0 : json_int(config, "sliding_window", 1, 4096);
}

void read_turning_kinds(const json& config, double theta, double windowed_theta,
                        const std::function<bool(int layer)>& has_window, ModelConfig& model) {
  const json& all = object_or_null(config, "rope_parameters");
  for (const auto& [name, value] : all.items()) {
    check_argument((name == "full_attention" || name == "sliding_attention") &&
                       (value.is_object() || value.is_null()),
                   "config.json: rope_parameters: expected objects full_attention and "
                   "sliding_attention, found ",
                   name, ": ", value.dump());
  }
  const bool by_type = has(all, "full_attention");
  AttentionKind full, windowed;
  full.rope =
      read_rope_object(by_type ? all.at("full_attention") : object_or_null(config, "rope_scaling"),
                       theta, model.max_position_embeddings);
  windowed.window = read_window(config);
  windowed.rope = read_rope_object(object_or_null(all, "sliding_attention"), windowed_theta,
                                   model.max_position_embeddings);
  set_attention(model, read_windowed_layers(config, model.num_layers, has_window), windowed, full);
}

void check_heads(const ModelConfig& model) {
  check_argument(model.num_heads % model.num_kv_heads == 0,
                 "config.json: num_attention_heads=", model.num_heads,
                 " is not a multiple of num_key_value_heads=", model.num_kv_heads);
  check_argument(model.num_heads / model.num_kv_heads <= 64, "config.json: ", model.num_heads,
                 " heads on ", model.num_kv_heads, " kv heads: at most 64 heads may share one");
}

float ModelConfig::score_scale() const {
  return attention_scale != 0.0f ? attention_scale : 1.0f / std::sqrt(static_cast<float>(head_dim));
}

std::vector<RopeConfig> ModelConfig::distinct_ropes() const {
  std::vector<RopeConfig> ropes;
  if (positions != PositionKind::kRotary) return ropes;
  for (const AttentionKind& kind : attention) {
    if (std::find(ropes.begin(), ropes.end(), kind.rope) == ropes.end()) ropes.push_back(kind.rope);
  }
  return ropes;
}

ModelConfig read_model_config(const std::filesystem::path& path) {
  const bool is_file = std::filesystem::is_regular_file(path);
  const std::filesystem::path file = is_file ? path : path / "config.json";
  const std::filesystem::path directory = file.parent_path();
  json config = io::read_json(file);
  check_argument(config.is_object(), file.string(), ": expected a JSON object");
  std::string model_type = json_string(config, "model_type", "");
  ModelConfig model = find_architecture(model_type).parse(config);
  model.model_type = model_type;
  read_low_rank(config, model);
  append_token_ids(config, "eos_token_id", model.eos_token_ids);
  if (std::filesystem::exists(directory / "generation_config.json")) {
    append_token_ids(io::read_json(directory / "generation_config.json"), "eos_token_id",
                     model.eos_token_ids);
  }
  return model;
}

}  // namespace deinfer

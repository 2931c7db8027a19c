#include "model/planned_model.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "deinfer/planner.h"
#include "plan/planner.h"

namespace deinfer {
namespace {

int rank_that_keeps(double keep, int n, int k) {
  const double parameters = static_cast<double>(n) * k;
  return std::max(1, static_cast<int>(std::floor(keep * parameters / (n + k))));
}

/// Finds ranks by module name and counts the names that were asked for.
class Ranks {
 public:
  Ranks(const ModelConfig& config, double keep) : config_(config), keep_(keep) {}

  LinearShape linear(const std::string& name, int n, int k, bool in_layer = true) {
    auto found = config_.lowrank_ranks.find(name);
    const bool stated = found != config_.lowrank_ranks.end();
    num_found_ += stated ? 1 : 0;
    if (keep_ > 0 && in_layer) return {n, k, rank_that_keeps(keep_, n, k)};
    return {n, k, stated ? found->second : 0};
  }
  std::size_t num_found() const { return num_found_; }

 private:
  const ModelConfig& config_;
  double keep_;
  std::size_t num_found_ = 0;
};

}  // namespace

ModelShape model_shape(const ModelConfig& config) {
  return {config.hidden_size,  config.intermediate_size, config.num_heads,
          config.num_kv_heads, config.head_dim,          config.vocab_size};
}

PlannedModel planned_model(const ModelConfig& config, double keep, std::string_view dtype) {
  check_argument(keep >= 0 && keep <= 1, "keep=", keep, " is not in (0, 1]");
  PlannedModel model;
  if (dtype == "float32") {
    model.weight_bytes = model.activation_bytes = 4;
  } else if (dtype == "int8") {
    model.weight_bytes = 1;
  } else {
    check_argument(dtype == "bfloat16", "dtype=\"", dtype, "\" is not float32, bfloat16 or int8");
  }
  model.shape = model_shape(config);
  model.tied_embeddings = config.tie_word_embeddings;
  auto kind_of = [&](const std::string& norm) {
    return norm.empty() ? NormKind::kNone : config.norm;
  };
  model.norms = {kind_of(config.names.attention_norm), kind_of(config.names.attention_output_norm),
                 config.qk_norm};
  if (config.positions == PositionKind::kLearned) {
    model.positions = config.position_offset + config.max_position_embeddings;
  }

  Ranks ranks(config, keep);
  const int hidden = config.hidden_size;
  const int query = config.num_heads * config.head_dim;
  const int kv = config.num_kv_heads * config.head_dim;
  const ModuleNames& names = config.names;
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = str_cat(names.layers, ".", i, ".");
    LayerShape layer;
    layer.query = ranks.linear(prefix + names.query, query, hidden);
    layer.key = ranks.linear(prefix + names.key, kv, hidden);
    layer.value = ranks.linear(prefix + names.value, kv, hidden);
    layer.attention_output = ranks.linear(prefix + names.output, hidden, query);
    if (config.mlp == MlpKind::kGatedSilu) {
      layer.gate = ranks.linear(prefix + names.gate, config.intermediate_size, hidden);
    }
    layer.up = ranks.linear(prefix + names.up, config.intermediate_size, hidden);
    layer.down = ranks.linear(prefix + names.down, hidden, config.intermediate_size);
    model.layers.push_back(layer);
  }
  model.head = ranks.linear(names.head, config.vocab_size, hidden, false);
  check_argument(ranks.num_found() == config.lowrank_ranks.size(),
                 "config.json: low_rank.ranks has ", config.lowrank_ranks.size(),
                 " modules, of which the model has ", ranks.num_found());
  return model;
}

PlanReport DEINFER_ABI::plan_tensor_parallelism(const PlannerConfig& config) {
  check_argument(
      config.memory_gib >= 0 && std::isfinite(config.memory_gib) && config.memory_gib < 1e6,
      "memory_gib=", config.memory_gib, " is not a size in GiB");
  PlannerOptions options;
  options.size = config.tensor_parallel_size;
  options.link = parse_link_model(config.link);
  options.hardware = parse_hardware(config.hardware);
  options.memory_bytes = static_cast<std::uint64_t>(config.memory_gib * (1 << 30));
  options.batches = config.batches;
  options.prefill = config.prefill;
  options.context = config.context;
  options.mix = config.mix;
  options.max_chunks = config.max_chunks;
  const ModelConfig model = read_model_config(config.model);
  return choose_plan(planned_model(model, config.keep, config.dtype), options);
}

}  // namespace deinfer

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

int rank_of(const ModelConfig& config, const std::string& name) {
  const auto found = config.lowrank_ranks.find(name);
  return found == config.lowrank_ranks.end() ? 0 : found->second;
}

LinearShape& place_of(LayerShape& layer, LinearRole role) {
  switch (role) {
    case LinearRole::kQuery: return layer.query;
    case LinearRole::kKey: return layer.key;
    case LinearRole::kValue: return layer.value;
    case LinearRole::kAttentionOutput: return layer.attention_output;
    case LinearRole::kGate: return layer.gate;
    case LinearRole::kUp: return layer.up;
    default: return layer.down;
  }
}

}  // namespace

ModelShape model_shape(const ModelConfig& config) {
  return {config.hidden_size,  config.intermediate_size, config.num_heads,
          config.num_kv_heads, config.head_dim,          config.vocab_size};
}

KvTraits kv_traits(const ModelConfig& config) {
  KvTraits traits;
  traits.group = config.num_heads / config.num_kv_heads;
  traits.head_dim = config.head_dim;
  traits.absorbs_keys = config.positions == PositionKind::kLearned &&
                        config.qk_norm == QkNormKind::kNone && config.attention_soft_cap == 0.0f;
  traits.scales_keys = config.qk_norm == QkNormKind::kFull;
  return traits;
}

std::vector<NamedLinear> layer_linears(const ModelConfig& config, int layer) {
  const int hidden = config.hidden_size;
  const int inner = config.intermediate_size;
  const int query = config.num_heads * config.head_dim;
  const int kv = config.num_kv_heads * config.head_dim;
  const ModuleNames& names = config.names;
  std::vector<NamedLinear> linears;
  auto add = [&](LinearRole role, const std::string& leaf, int n, int k) {
    const std::string name = str_cat(names.layers, ".", layer, ".", leaf);
    linears.push_back({role, name, {n, k, rank_of(config, name)}});
  };
  add(LinearRole::kQuery, names.query, query, hidden);
  add(LinearRole::kKey, names.key, kv, hidden);
  add(LinearRole::kValue, names.value, kv, hidden);
  add(LinearRole::kAttentionOutput, names.output, hidden, query);
  if (is_gated(config.mlp)) add(LinearRole::kGate, names.gate, inner, hidden);
  add(LinearRole::kUp, names.up, inner, hidden);
  add(LinearRole::kDown, names.down, hidden, inner);
  return linears;
}

void check_ranks(const ModelConfig& config) {
  std::size_t found = config.lowrank_ranks.count(config.names.head);
  for (int i = 0; i < config.num_layers; ++i) {
    for (const NamedLinear& linear : layer_linears(config, i))
      found += linear.shape.rank > 0 ? 1 : 0;
  }
  check_argument(found == config.lowrank_ranks.size(), "config.json: low_rank.ranks has ",
                 config.lowrank_ranks.size(), " modules, of which the model has ", found);
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
  const KvTraits traits = kv_traits(config);
  model.absorbs_keys = traits.absorbs_keys;
  model.scales_keys = traits.scales_keys;
  model.tied_embeddings = config.tie_word_embeddings;
  auto kind_of = [&](const std::string& norm) {
    return norm.empty() ? NormKind::kNone : config.norm;
  };
  model.norms = {kind_of(config.names.attention_norm), kind_of(config.names.attention_output_norm),
                 config.qk_norm};
  if (config.positions == PositionKind::kLearned) {
    model.positions = config.position_offset + config.max_position_embeddings;
  }

  for (int i = 0; i < config.num_layers; ++i) {
    LayerShape& layer = model.layers.emplace_back();
    for (const NamedLinear& linear : layer_linears(config, i)) {
      LinearShape& shape = place_of(layer, linear.role);
      shape = linear.shape;
      if (keep > 0) shape.rank = rank_that_keeps(keep, shape.n, shape.k);
    }
  }
  model.head = {config.vocab_size, config.hidden_size, rank_of(config, config.names.head)};
  check_ranks(config);
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
  options.kv_cache = config.kv_cache;
  options.kv_latents = config.kv_latents;
  options.max_chunks = config.max_chunks;
  const ModelConfig model = read_model_config(config.model);
  return choose_plan(planned_model(model, config.keep, config.dtype), options);
}

}  // namespace deinfer

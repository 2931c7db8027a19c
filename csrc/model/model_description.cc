#include "deinfer/model_description.h"

#include <algorithm>

#include "model/planned_model.h"
#include "model/registry.h"

namespace deinfer {
namespace {

std::string activation_name(MlpKind kind) {
  switch (kind) {
    case MlpKind::kGatedSilu: return "silu";
    case MlpKind::kGatedGeluTanh: return "gelu_pytorch_tanh";
    case MlpKind::kRelu: return "relu";
  }
  return {};
}

std::string qk_norm_name(QkNormKind kind) {
  switch (kind) {
    case QkNormKind::kNone: return "none";
    case QkNormKind::kPerHead: return "per_head";
    case QkNormKind::kFull: return "full";
  }
  return {};
}

std::uint64_t product(int a, int b) {
  return static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b);
}

/// Of the norms of all layers and the last one.
std::uint64_t norm_parameters(const ModelConfig& config) {
  const ModuleNames& names = config.names;
  const int vectors = config.norm == NormKind::kLayer ? 2 : 1;
  auto present = [](const std::string& name) { return name.empty() ? 0 : 1; };
  const int norms = present(names.attention_norm) + present(names.attention_output_norm) +
                    present(names.mlp_norm) + present(names.mlp_output_norm);
  std::uint64_t per_layer = product(norms * vectors, config.hidden_size);
  if (config.qk_norm == QkNormKind::kPerHead) per_layer += product(2, config.head_dim);
  if (config.qk_norm == QkNormKind::kFull) {
    per_layer += product(config.num_heads + config.num_kv_heads, config.head_dim);
  }
  return static_cast<std::uint64_t>(config.num_layers) * per_layer +
         product(present(names.final_norm) * vectors, config.hidden_size);
}

std::vector<AttentionDescription> describe_attention(const ModelConfig& config) {
  std::vector<AttentionDescription> kinds;
  const bool rotary = config.positions == PositionKind::kRotary;
  for (const AttentionKind& kind : config.attention) {
    AttentionDescription& described = kinds.emplace_back();
    described.window = kind.window;
    if (!rotary) continue;
    described.rope_type = kind.rope.type;
    described.rope_theta = kind.rope.theta;
    described.rope_factor = kind.rope.factor;
  }
  for (int i = 0; i < config.num_layers; ++i) {
    ++kinds[static_cast<std::size_t>(config.attention_of(i))].num_layers;
  }
  return kinds;
}

}  // namespace

ModelDescription DEINFER_ABI::describe_config(const std::string& path) {
  const ModelConfig config = read_model_config(path);
  check_ranks(config);
  ModelDescription model;
  model.model_type = config.model_type;
  model.num_layers = config.num_layers;
  model.hidden_size = config.hidden_size;
  model.intermediate_size = config.intermediate_size;
  model.num_heads = config.num_heads;
  model.num_kv_heads = config.num_kv_heads;
  model.head_dim = config.head_dim;
  model.vocab_size = config.vocab_size;
  model.max_model_len = config.max_position_embeddings;
  model.tied_embeddings = config.tie_word_embeddings;
  model.activation = activation_name(config.mlp);
  model.norm = config.norm == NormKind::kLayer ? "layer" : "rms";
  model.norms_inputs = !config.names.attention_norm.empty();
  model.norms_outputs = !config.names.attention_output_norm.empty();
  model.qk_norm = qk_norm_name(config.qk_norm);
  model.attention_soft_cap = config.attention_soft_cap;
  model.logit_soft_cap = config.logit_soft_cap;
  model.attention = describe_attention(config);
  model.embedding = config.names.embedding + ".weight";
  for (const PrefixRule& rule : config.prefix_rules) {
    model.tensor_prefixes.push_back({rule.prefix, rule.replacement});
  }
  const int tables = config.tie_word_embeddings ? 1 : 2;
  model.parameters = product(tables * config.vocab_size, config.hidden_size);
  if (config.positions == PositionKind::kLearned) {
    model.parameters +=
        product(config.position_offset + config.max_position_embeddings, config.hidden_size);
  }
  model.parameters += norm_parameters(config);
  for (int i = 0; i < config.num_layers; ++i) {
    for (const NamedLinear& linear : layer_linears(config, i)) {
      const auto& [n, k, rank] = linear.shape;
      model.linears.push_back({linear.name, n, k, rank});
      model.parameters += rank > 0 ? product(rank, n + k) : product(n, k);
    }
  }
  model.kv_elements_per_token = product(2 * config.num_layers, config.num_kv_heads) *
                                static_cast<std::uint64_t>(config.head_dim);
  const PlannedModel planned = planned_model(config, 0.0, "float32");
  KvTraits traits = planned.kv_traits();
  traits.scales_keys = false;
  for (const LayerShape& layer : planned.layers) {
    auto form = [&](const LinearShape& shape, auto latent) {
      return shape.rank == 0 ? KvForm::kDense : latent(traits, shape.rank);
    };
    const KvForm k = form(layer.key, latent_key_form);
    const KvForm v = form(layer.value, latent_value_form);
    model.latent_kv_elements_per_token +=
        kv_key_shape(traits, k, layer.key.rank, config.num_kv_heads, 4).elements() +
        kv_value_shape(traits, v, layer.value.rank, config.num_kv_heads).elements();
    if (planned.scales_keys && k == KvForm::kRebuilt) {
      model.latent_kv_factor_bytes_per_token += sizeof(float);
    }
  }
  return model;
}

std::vector<std::string> DEINFER_ABI::supported_architectures() {
  std::vector<std::string> names;
  for (const Architecture& architecture : architectures()) {
    names.emplace_back(architecture.model_type);
  }
  return names;
}

}  // namespace deinfer

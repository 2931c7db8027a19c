#include "model/decoder_weights.h"

#include <algorithm>
#include <tuple>

#include "base/check.h"
#include "ops/latent_kv.h"
#include "ops/lowrank_linear.h"

namespace deinfer {

Norm load_norm(const ModelConfig& config, const std::string& prefix, const std::string& name, int n,
               WeightLoader& loader) {
  Norm norm;
  if (name.empty()) return norm;
  norm.kind = config.norm;
  norm.eps = config.norm_eps;
  norm.gain = loader.vector(prefix + name + ".weight", n);
  if (norm.kind == NormKind::kRms) {
    for (float& gain : norm.gain) gain += config.norm_gain_offset;
  }
  if (norm.kind == NormKind::kLayer) norm.bias = loader.vector(prefix + name + ".bias", n);
  return norm;
}

Norm load_head_norm(const ModelConfig& config, const std::string& prefix, const std::string& name,
                    int heads, Range own, WeightLoader& loader) {
  const int head_dim = config.head_dim;
  if (config.qk_norm == QkNormKind::kPerHead) {
    return load_norm(config, prefix, name, head_dim, loader);
  }
  Norm norm = load_norm(config, prefix, name, heads * head_dim, loader);
  auto begin = norm.gain.begin() + std::ptrdiff_t{own.begin} * head_dim;
  norm.gain = std::vector<float>(begin, begin + std::ptrdiff_t{own.size()} * head_dim);
  return norm;
}

namespace {

DecoderLayer load_layer(const ModelConfig& config, const RankShare& share,
                        const std::string& prefix, bool all_heads, WeightLoader& loader) {
  const ModuleNames& names = config.names;
  int hidden = config.hidden_size;
  int inner = config.intermediate_size;
  int query_size = config.num_heads * config.head_dim;
  int kv_size = config.num_kv_heads * config.head_dim;
  auto norm = [&](const std::string& name) {
    return load_norm(config, prefix, name, hidden, loader);
  };
  auto row_map = [&](Range heads) {
    return rotates_tiles(config) ? rotary_row_map(heads.size(), config.head_dim)
                                 : std::vector<std::int32_t>{};
  };
  DecoderLayer layer;
  layer.heads = share.attention_heads(all_heads);
  layer.attention_norm = norm(names.attention_norm);
  layer.query = loader.linear(prefix + names.query, LinearRole::kQuery, query_size, hidden,
                              row_map(layer.heads.heads), all_heads);
  layer.key = loader.linear(prefix + names.key, LinearRole::kKey, kv_size, hidden,
                            row_map(layer.heads.kv_heads), all_heads);
  layer.value =
      loader.linear(prefix + names.value, LinearRole::kValue, kv_size, hidden, {}, all_heads);
  if (config.qk_norm != QkNormKind::kNone) {
    layer.query_norm = load_head_norm(config, prefix, names.query_norm, config.num_heads,
                                      layer.heads.heads, loader);
    layer.key_norm = load_head_norm(config, prefix, names.key_norm, config.num_kv_heads,
                                    layer.heads.kv_heads, loader);
  }
  layer.output =
      loader.linear(prefix + names.output, LinearRole::kAttentionOutput, hidden, query_size);
  layer.attention_output_norm = norm(names.attention_output_norm);
  layer.mlp_norm = norm(names.mlp_norm);
  if (is_gated(config.mlp)) {
    std::tie(layer.gate, layer.up) =
        loader.gate_and_up(prefix + names.gate, prefix + names.up, inner, hidden);
  } else {
    layer.up = loader.linear(prefix + names.up, LinearRole::kUp, inner, hidden);
  }
  layer.down = loader.linear(prefix + names.down, LinearRole::kDown, hidden, inner);
  layer.mlp_output_norm = norm(names.mlp_output_norm);
  return layer;
}

/// What the keys and values of a layer need for the forms in which they are kept.
void set_kv_forms(const ModelConfig& config, const KvForms& forms, WeightLoader& loader,
                  DecoderLayer& layer) {
  check_has_latents(layer.key, forms.k);
  check_has_latents(layer.value, forms.v);
  layer.kv = forms;
  if (forms.k != KvForm::kAbsorbed) return;
  layer.absorbed_key =
      transposed_heads(layer.key, layer.heads.kv_heads.size(), config.head_dim, loader.team());
}

/// The norm terms of a linear of which this rank has the columns `own`.
void share_terms(LowRankLinear& linear, const Norm& norm, Range own, ThreadTeam& team,
                 Communicator& communicator) {
  if (!linear.is_low_rank() || norm.kind != NormKind::kLayer) return;
  const auto rank = static_cast<std::size_t>(linear.rank);
  const auto size = static_cast<std::size_t>(communicator.size());
  std::vector<float> parts(2 * rank);  // V g, V b of these columns
  team.run([&](TeamMember& member) {
    std::vector<float> row(static_cast<std::size_t>(linear.v.k));
    auto [first, last] = member.share(linear.rank);
    for (int j = first; j < last; ++j) {
      linear.v.read_row(j, row.data());
      double gain = 0, bias = 0;
      for (int k = 0; k < own.size(); ++k) {
        auto column = static_cast<std::size_t>(own.begin + k);
        gain += static_cast<double>(row[static_cast<std::size_t>(k)]) * norm.gain[column];
        bias += static_cast<double>(row[static_cast<std::size_t>(k)]) * norm.bias[column];
      }
      parts[static_cast<std::size_t>(j)] = static_cast<float>(gain);
      parts[rank + static_cast<std::size_t>(j)] = static_cast<float>(bias);
    }
  });
  std::vector<float> all(size * parts.size());
  communicator.all_gather(parts.data(), parts.size() * sizeof(float), all.data());
  linear.norm_terms.gain.resize(size * rank);
  linear.norm_terms.bias.assign(rank, 0.0f);
  for (std::size_t r = 0; r < size; ++r) {
    const float* theirs = all.data() + r * parts.size();
    std::copy_n(theirs, rank, linear.norm_terms.gain.data() + r * rank);
    for (std::size_t j = 0; j < rank; ++j) linear.norm_terms.bias[j] += theirs[rank + j];
  }
}

}  // namespace

std::vector<const LowRankLinear*> DecoderLayer::linears() const {
  std::vector<const LowRankLinear*> all = {&query, &key, &value, &output, &up, &down, &gate};
  if (gate.name.empty()) all.pop_back();  // a plain MLP
  return all;
}

std::size_t DecoderLayer::bytes() const {
  std::size_t total = 0;
  for (const LowRankLinear* linear : linears()) total += linear->bytes();
  for (const Norm* norm : {&attention_norm, &attention_output_norm, &query_norm, &key_norm,
                           &mlp_norm, &mlp_output_norm}) {
    total += norm->bytes();
  }
  for (const cpu::PackedMatrix& head : absorbed_key) total += head.bytes();
  return total;
}

std::size_t DecoderWeights::bytes() const {
  std::size_t total = embedding.bytes() + positions.bytes() + head.bytes() + final_norm.bytes();
  for (const DecoderLayer& layer : layers) total += layer.bytes();
  return total;
}

bool rotates_tiles(const ModelConfig& config) {
  return config.positions == PositionKind::kRotary && config.qk_norm == QkNormKind::kNone;
}

DecoderWeights load_decoder(const ModelConfig& config, const RankShare& share,
                            cpu::WeightFormat format, const std::vector<KvForms>& kv_forms,
                            WeightLoader& loader) {
  DecoderWeights weights;
  const DType dtype = format.dtype;
  weights.format = format;
  weights.activations = dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  loader.set_format(format);
  const ModuleNames& names = config.names;
  cpu::PackedMatrix embedding =
      loader.embedding(config.tie_word_embeddings ? dtype : weights.activations,
                       names.embedding + ".weight", config.vocab_size, config.hidden_size);
  if (config.positions == PositionKind::kLearned) {
    weights.positions = loader.positions(weights.activations, names.positions + ".weight",
                                         config.position_offset + config.max_position_embeddings,
                                         config.hidden_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    std::string prefix = names.layers + "." + std::to_string(i) + ".";
    const KvForms forms = kv_forms.empty() ? KvForms{} : kv_forms[static_cast<std::size_t>(i)];
    weights.layers.push_back(load_layer(config, share, prefix, forms.token_sharded, loader));
    set_kv_forms(config, forms, loader, weights.layers.back());
  }
  weights.final_norm = load_norm(config, "", names.final_norm, config.hidden_size, loader);
  if (config.tie_word_embeddings) {
    weights.head.name = names.embedding;
    weights.head.w = std::move(embedding);
  } else {
    weights.head =
        loader.linear(names.head, LinearRole::kHead, config.vocab_size, config.hidden_size);
    weights.embedding = std::move(embedding);
  }
  loader.check_all_used();
  return weights;
}

void share_norm_terms(DecoderWeights& weights, const RankShare& share, ThreadTeam& team,
                      Communicator& communicator) {
  if (share.hidden.empty()) return;
  const Range own = share.hidden[static_cast<std::size_t>(share.rank)];
  for (DecoderLayer& layer : weights.layers) {
    for (LowRankLinear* linear : {&layer.query, &layer.key, &layer.value}) {
      share_terms(*linear, layer.attention_norm, own, team, communicator);
    }
    for (LowRankLinear* linear : {&layer.gate, &layer.up}) {
      share_terms(*linear, layer.mlp_norm, own, team, communicator);
    }
  }
}

}  // namespace deinfer

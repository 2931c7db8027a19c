#include "model/decoder.h"

#include <algorithm>
#include <cmath>

#include "ops/embedding.h"
#include "ops/qk_norm.h"

namespace deinfer {
namespace {

std::size_t float_bytes(int rows, int cols) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(float);
}

/// Columns of z that the widest group of linears with a common input needs.
int max_z_cols(const DecoderWeights& weights) {
  int cols = weights.head.z_cols();
  for (const DecoderLayer& layer : weights.layers) {
    cols = std::max({cols, layer.query.z_cols() + layer.key.z_cols() + layer.value.z_cols(),
                     layer.output.z_cols(), layer.gate.z_cols() + layer.up.z_cols(),
                     layer.down.z_cols()});
  }
  return std::max(cols, 1);
}

AttentionShape attention_shape(const ModelConfig& config) {
  AttentionShape shape;
  shape.heads = config.num_heads;
  shape.kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.window = config.sliding_window;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  return shape;
}

/// Whether q and k are rotated where they are computed: nothing comes between product and rotation.
bool rotates_tiles(const ModelConfig& config) {
  return config.positions == PositionKind::kRotary && config.qk_norm == QkNormKind::kNone;
}

bool needs_branch(const ModelConfig& config) {
  const ModuleNames& names = config.names;
  return !names.attention_output_norm.empty() || !names.mlp_output_norm.empty() ||
         config.positions == PositionKind::kLearned;
}

Norm load_norm(const ModelConfig& config, const std::string& prefix, const std::string& name, int n,
               WeightLoader& loader) {
  Norm norm;
  if (name.empty()) return norm;
  norm.kind = config.norm;
  norm.eps = config.norm_eps;
  norm.gain = loader.vector(prefix + name + ".weight", n);
  if (norm.kind == NormKind::kLayer) norm.bias = loader.vector(prefix + name + ".bias", n);
  return norm;
}

DecoderLayer load_layer(const ModelConfig& config, const std::string& prefix,
                        WeightLoader& loader) {
  const ModuleNames& names = config.names;
  int hidden = config.hidden_size;
  int inner = config.intermediate_size;
  int query_size = config.num_heads * config.head_dim;
  int kv_size = config.num_kv_heads * config.head_dim;
  auto norm = [&](const std::string& name, int n) {
    return load_norm(config, prefix, name, n, loader);
  };
  auto row_map = [&](int heads) {
    return rotates_tiles(config) ? rotary_row_map(heads, config.head_dim)
                                 : std::vector<std::int32_t>{};
  };
  DecoderLayer layer;
  layer.attention_norm = norm(names.attention_norm, hidden);
  layer.query = loader.linear(prefix + names.query, LinearRole::kQuery, query_size, hidden,
                              row_map(config.num_heads));
  layer.key = loader.linear(prefix + names.key, LinearRole::kKey, kv_size, hidden,
                            row_map(config.num_kv_heads));
  layer.value = loader.linear(prefix + names.value, LinearRole::kValue, kv_size, hidden);
  if (config.qk_norm != QkNormKind::kNone) {
    bool full = config.qk_norm == QkNormKind::kFull;
    layer.query_norm = norm(names.query_norm, full ? query_size : config.head_dim);
    layer.key_norm = norm(names.key_norm, full ? kv_size : config.head_dim);
  }
  layer.output =
      loader.linear(prefix + names.output, LinearRole::kAttentionOutput, hidden, query_size);
  layer.attention_output_norm = norm(names.attention_output_norm, hidden);
  layer.mlp_norm = norm(names.mlp_norm, hidden);
  if (config.mlp == MlpKind::kGatedSilu) {
    layer.gate = loader.linear(prefix + names.gate, LinearRole::kGate, inner, hidden);
  }
  layer.up = loader.linear(prefix + names.up, LinearRole::kUp, inner, hidden);
  layer.down = loader.linear(prefix + names.down, LinearRole::kDown, hidden, inner);
  layer.mlp_output_norm = norm(names.mlp_output_norm, hidden);
  return layer;
}

}  // namespace

std::vector<const LowRankLinear*> DecoderLayer::linears() const {
  std::vector<const LowRankLinear*> all = {&query, &key, &value, &output, &up, &down};
  if (!gate.output_factor().empty()) all.push_back(&gate);
  return all;
}

std::size_t DecoderLayer::bytes() const {
  std::size_t total = 0;
  for (const LowRankLinear* linear : linears()) total += linear->bytes();
  for (const Norm* norm : {&attention_norm, &attention_output_norm, &query_norm, &key_norm,
                           &mlp_norm, &mlp_output_norm}) {
    total += norm->bytes();
  }
  return total;
}

std::size_t DecoderWeights::bytes() const {
  std::size_t total = embedding.bytes() + positions.bytes() + head.bytes() + final_norm.bytes();
  for (const DecoderLayer& layer : layers) total += layer.bytes();
  return total;
}

DecoderWeights load_decoder(const ModelConfig& config, DType dtype, WeightLoader& loader) {
  DecoderWeights weights;
  weights.dtype = dtype;
  weights.activations = dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  loader.set_dtype(dtype);
  const ModuleNames& names = config.names;
  cpu::PackedMatrix embedding =
      loader.matrix(config.tie_word_embeddings ? dtype : weights.activations,
                    names.embedding + ".weight", config.vocab_size, config.hidden_size);
  if (config.positions == PositionKind::kLearned) {
    weights.positions =
        loader.matrix(weights.activations, names.positions + ".weight",
                      config.position_offset + config.max_position_embeddings, config.hidden_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    std::string prefix = names.layers + "." + std::to_string(i) + ".";
    weights.layers.push_back(load_layer(config, prefix, loader));
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

Decoder::Decoder(const ModelConfig& config, DecoderWeights weights, const BatchLimits& limits,
                 int num_threads)
    : config_(config),
      weights_(std::move(weights)),
      rope_(config.rope, config.head_dim, limits.max_model_len),
      attention_(attention_shape(config), num_threads),
      angle_cols_((config.head_dim / 2 + cpu::kLanes - 1) / cpu::kLanes * cpu::kLanes),
      cos_(float_bytes(limits.max_tokens, angle_cols_)),
      sin_(float_bytes(limits.max_tokens, angle_cols_)),
      residual_(float_bytes(limits.max_tokens, config.hidden_size)),
      query_(float_bytes(limits.max_tokens, config.num_heads * config.head_dim)),
      key_(float_bytes(config.qk_norm == QkNormKind::kNone ? 0 : limits.max_tokens,
                       config.num_kv_heads * config.head_dim)),
      branch_(float_bytes(needs_branch(config) ? limits.max_tokens : 0, config.hidden_size)),
      normed_(weights_.activations, std::max(limits.max_tokens, kLogitRows), config.hidden_size),
      attended_(weights_.activations, limits.max_tokens, config.num_heads * config.head_dim),
      inner_(weights_.activations, limits.max_tokens, config.intermediate_size),
      z_(weights_.activations, std::max(limits.max_tokens, kLogitRows), max_z_cols(weights_)),
      maxima_(static_cast<std::size_t>(num_threads)) {
  for (RowMaximum& maximum : maxima_) {
    maximum.value.resize(kLogitRows);
    maximum.index.resize(kLogitRows);
  }
}

KvCacheConfig Decoder::kv_cache_config(int block_size, std::int64_t num_blocks) const {
  return {config_.num_layers, config_.num_kv_heads, config_.head_dim,
          block_size,         num_blocks,           weights_.activations};
}

std::size_t Decoder::attention_scratch(const cpu::KernelTable& kernels) const {
  return attention_scratch_bytes(kernels, attention_shape(config_));
}

void Decoder::plan(const Batch& batch) { attention_.plan(batch); }

void Decoder::forward(ExecutionContext& ctx, const Batch& batch, KvCache& cache) {
  if (config_.positions == PositionKind::kRotary) {
    auto [begin, end] = ctx.member.share(batch.num_tokens());
    for (int i = begin; i < end; ++i) {
      rope_.angles(batch.positions[static_cast<std::size_t>(i)], cos_.as<float>() + i * angle_cols_,
                   sin_.as<float>() + i * angle_cols_);
    }
  }
  embedding(ctx, batch.token_ids, weights_.token_embedding(), residual(), config_.hidden_size);
  if (config_.positions == PositionKind::kLearned) {
    add_positions(ctx, batch.positions, config_.position_offset, weights_.positions,
                  branch_.as<float>(), residual(), config_.hidden_size);
  }
  for (int i = 0; i < config_.num_layers; ++i) {
    const DecoderLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
    attention_block(ctx, batch, layer, cache.layer(i));
    mlp_block(ctx, batch.num_tokens(), layer);
  }
}

Activations Decoder::normed(ExecutionContext& ctx, int m, const Norm& norm, const int* rows) {
  return normalize(ctx, m, config_.hidden_size, residual(), config_.hidden_size, norm,
                   normed_.view(), rows);
}

void Decoder::add_to_residual(ExecutionContext& ctx, int m, const Activations& x,
                              const LowRankLinear& linear, const Norm& norm) {
  int hidden = config_.hidden_size;
  if (norm.kind == NormKind::kNone) {
    lowrank_linear_add(ctx, m, x, linear, z_.view(), residual(), hidden);
    return;
  }
  auto* branch = branch_.as<float>();
  lowrank_linear(ctx, m, x, linear, z_.view(), branch, hidden);
  normalize_add(ctx, m, hidden, branch, hidden, norm, residual(), hidden);
}

void Decoder::attention_block(ExecutionContext& ctx, const Batch& batch, const DecoderLayer& layer,
                              const KvLayer& kv) {
  int m = batch.num_tokens();
  Activations x = normed(ctx, m, layer.attention_norm);
  QkvOutput qkv;
  qkv.q = query_.as<float>();
  qkv.ldq = std::ptrdiff_t{config_.num_heads} * config_.head_dim;
  qkv.kv = kv;
  qkv.slots = batch.slots;
  if (rotates_tiles(config_)) qkv.angles = angles();
  if (config_.qk_norm != QkNormKind::kNone) {
    qkv.k = key_.as<float>();
    qkv.ldk = std::ptrdiff_t{config_.num_kv_heads} * config_.head_dim;
  }
  lowrank_qkv(ctx, m, x, layer.query, layer.key, layer.value, z_.view(), qkv);
  if (config_.qk_norm != QkNormKind::kNone) {
    normalize_qk(ctx, m, config_.num_heads, config_.qk_norm, layer.query_norm, layer.key_norm,
                 angles(), qkv);
  }
  attention_.run(ctx, batch, qkv.q, qkv.ldq, kv, attended_.view());
  add_to_residual(ctx, m, attended_.view(), layer.output, layer.attention_output_norm);
}

void Decoder::mlp_block(ExecutionContext& ctx, int m, const DecoderLayer& layer) {
  Activations x = normed(ctx, m, layer.mlp_norm);
  if (config_.mlp == MlpKind::kGatedSilu) {
    lowrank_gated_mlp(ctx, m, x, layer.gate, layer.up, z_.view(), inner_.view());
  } else {
    lowrank_relu(ctx, m, x, layer.up, z_.view(), inner_.view());
  }
  add_to_residual(ctx, m, inner_.view(), layer.down, layer.mlp_output_norm);
}

void Decoder::logits(ExecutionContext& ctx, const Batch& batch, int first, int count, float* out) {
  Activations x = normed(ctx, count, weights_.final_norm, batch.logit_rows.data() + first);
  lowrank_linear(ctx, count, x, weights_.head, z_.view(), out, config_.vocab_size);
}

void Decoder::most_likely(ExecutionContext& ctx, const Batch& batch, int first, int count,
                          TokenId* tokens) {
  Activations x = normed(ctx, count, weights_.final_norm, batch.argmax_rows.data() + first);
  lowrank_argmax(ctx, count, x, weights_.head, z_.view(), maxima_, tokens);
}

}  // namespace deinfer

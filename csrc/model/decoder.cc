#include "model/decoder.h"

#include <algorithm>
#include <initializer_list>
#include <map>

#include "base/bf16.h"
#include "model/planned_model.h"
#include "ops/output_head.h"
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

/// Whether one of the linears wants its whole input from all ranks.
bool gathers(StepKind kind, std::initializer_list<const LowRankLinear*> linears) {
  return std::any_of(linears.begin(), linears.end(), [&](const LowRankLinear* linear) {
    return linear->exchange(kind).before != Exchange::kNone;
  });
}

AttentionShape attention_shape(const ModelConfig& config, const DecoderLayer& layer,
                               const AttentionKind& kind) {
  AttentionShape shape;
  shape.heads = layer.heads.heads.size();
  shape.kv_heads = layer.heads.kv_heads.size();
  shape.head_dim = config.head_dim;
  shape.forms = layer.kv;
  shape.window = kind.window;
  shape.scale = config.score_scale();
  shape.soft_cap = config.attention_soft_cap;
  return shape;
}

/// As the product with it is in the activation type.
float embedding_scale(const ModelConfig& config, DType activations) {
  if (activations == DType::kFloat32) return config.embedding_scale;
  return to_float(to_bf16(config.embedding_scale));
}

/// The most heads to which some layer attends.
HeadShare most_heads(const RankShare& share, const DecoderWeights& weights) {
  const bool all = std::any_of(weights.layers.begin(), weights.layers.end(),
                               [](const DecoderLayer& layer) { return layer.kv.token_sharded; });
  return share.attention_heads(all);
}

bool shards_residual(const RankShare& share) {
  return std::any_of(share.residual.begin(), share.residual.end(),
                     [](ResidualLayout layout) { return layout != ResidualLayout::kReplicated; });
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const RankShare& share, DecoderWeights weights,
                 const BatchLimits& limits, int num_threads)
    : config_(config),
      share_(share),
      weights_(std::move(weights)),
      block_size_(limits.block_size),
      token_sharded_(std::any_of(weights_.layers.begin(), weights_.layers.end(),
                                 [](const DecoderLayer& layer) { return layer.kv.token_sharded; })),
      max_tokens_(limits.max_tokens),
      angle_cols_((config.head_dim / 2 + cpu::kLanes - 1) / cpu::kLanes * cpu::kLanes),
      query_(float_bytes(limits.max_tokens,
                         most_heads(share, weights_).heads.size() * config.head_dim)),
      key_(float_bytes(config.qk_norm == QkNormKind::kNone ? 0 : limits.max_tokens,
                       most_heads(share, weights_).kv_heads.size() * config.head_dim)),
      residual_(config.hidden_size, share.hidden, weights_.activations,
                {limits.max_tokens, kLogitRows, config.has_output_norms(), shards_residual(share)}),
      attended_(weights_.activations, limits.max_tokens,
                share.heads.heads.size() * config.head_dim),
      inner_(weights_.activations, limits.max_tokens, std::max(share.intermediate, 1)),
      z_(weights_.activations, std::max(limits.max_tokens, kLogitRows), max_z_cols(weights_)),
      maxima_(static_cast<std::size_t>(num_threads)),
      best_value_(kLogitRows),
      state_layers_(limits.state_layers),
      state_memory_(float_bytes(static_cast<int>(state_layers_.size()) * limits.max_state_rows,
                                config.hidden_size)) {
  const std::vector<RopeConfig> ropes = config.distinct_ropes();
  for (const RopeConfig& rope : ropes) {
    ropes_.emplace_back(rope, config.head_dim, limits.max_model_len);
  }
  cos_ = Buffer(ropes.size() * float_bytes(max_tokens_, angle_cols_));
  sin_ = Buffer(ropes.size() * float_bytes(max_tokens_, angle_cols_));
  make_attention(num_threads);
  positions_.resize(ropes.size());
  for (const Attention& attention : attention_) {
    if (attention.shape.forms.k != KvForm::kRebuilt || ropes.empty()) continue;
    positions_[attention.rope].emplace(ropes_[attention.rope], angle_cols_, limits.max_model_len);
  }
  for (RowMaximum& maximum : maxima_) {
    maximum.value.resize(kLogitRows);
    maximum.index.resize(kLogitRows);
  }
}

void Decoder::make_attention(int num_threads) {
  const std::vector<RopeConfig> ropes = config_.distinct_ropes();
  for (int i = 0; i < config_.num_layers; ++i) {
    const DecoderLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
    const int kind = config_.attention_of(i);
    auto found = std::find_if(attention_.begin(), attention_.end(), [&](const Attention& known) {
      return known.kind == kind && known.shape.forms == layer.kv;
    });
    if (found == attention_.end()) {
      const AttentionKind& attention = config_.attention[static_cast<std::size_t>(kind)];
      auto rope = std::find(ropes.begin(), ropes.end(), attention.rope);
      found = attention_.insert(found, {kind,
                                        attention_shape(config_, layer, attention),
                                        static_cast<std::size_t>(rope - ropes.begin()),
                                        {}});
      if (layer.kv.token_sharded) {
        found->shape.share = {share_.rank, share_.size, block_size_ / share_.size};
        found->shape.out_heads = share_.heads.heads;
      }
    }
    AttentionShape& shape = found->shape;
    if (shape.absorbs_k()) shape.k_latent = std::max(shape.k_latent, layer.key.inner_size());
    if (shape.absorbs_v()) shape.v_latent = std::max(shape.v_latent, layer.value.inner_size());
    layer_attention_.push_back(static_cast<std::size_t>(found - attention_.begin()));
  }
  for (Attention& attention : attention_) {
    attention.schedule.emplace(attention.shape, weights_.activations, num_threads);
  }
  wanted_attention_.emplace(attention_of(config_.num_layers - 1).shape, weights_.activations,
                            num_threads);
}

LatentKv Decoder::latents_of(const DecoderLayer& layer, const Attention& attention) const {
  LatentKv latents;
  latents.key = &layer.key;
  latents.value = &layer.value;
  latents.absorbed_key = layer.absorbed_key;
  latents.key_norm_kind = config_.qk_norm;
  latents.key_norm = &layer.key_norm;
  if (attention.rope < positions_.size() && positions_[attention.rope]) {
    latents.angles = positions_[attention.rope]->view();
  }
  return latents;
}

std::size_t Decoder::exchange_bytes(const ModelConfig& config, const RankShare& share,
                                    const std::vector<KvForms>& kv_forms, int max_tokens) {
  if (share.size == 1) return 0;
  // Linears that share an exchange have the same parent module; two more for norm statistics, which
  // also travel alone.
  std::map<std::string, int> ranks;
  for (const auto& [name, rank] : config.lowrank_ranks) {
    ranks[name.substr(0, name.rfind('.'))] += rank;
  }
  int columns = std::max(config.hidden_size, 2);
  for (const auto& [parent, sum] : ranks) columns = std::max(columns, sum + 2);
  if (!share.plans[0]->merges_exchanges()) {  // whole outputs travel
    columns = std::max({columns, config.intermediate_size, config.num_heads * config.head_dim});
  }
  int tokens = std::min(max_tokens, kTileTokens);
  std::size_t bytes = std::max({float_bytes(tokens, columns), float_bytes(1, config.vocab_size),
                                float_bytes(kLogitRows, 2)});
  const bool token_sharded = std::any_of(kv_forms.begin(), kv_forms.end(),
                                         [](const KvForms& forms) { return forms.token_sharded; });
  if (!token_sharded) return bytes;
  return std::max(bytes, float_bytes(std::min(max_tokens, kAttentionTokens),
                                     attention_part_columns(model_shape(config))));
}

int Decoder::logit_rows(std::size_t exchange_bytes) const {
  if (share_.size == 1) return kLogitRows;
  std::size_t rows =
      exchange_bytes / float_bytes(1, std::max(config_.vocab_size, config_.hidden_size));
  return static_cast<int>(std::clamp<std::size_t>(rows, 1, kLogitRows));
}

KvCacheConfig Decoder::kv_cache_config(std::int64_t num_blocks) const {
  const KvTraits traits = kv_traits(config_);
  const int element = static_cast<int>(dtype_size(weights_.activations));
  KvCacheConfig cache{{}, block_size_, num_blocks, weights_.activations, share_.rank};
  for (const DecoderLayer& layer : weights_.layers) {
    const int kv_heads = layer.heads.kv_heads.size();
    cache.layers.push_back(
        {kv_key_shape(traits, layer.kv.k, layer.key.inner_size(), kv_heads, element),
         kv_value_shape(traits, layer.kv.v, layer.value.inner_size(), kv_heads),
         layer.kv.token_sharded ? share_.size : 1});
  }
  return cache;
}

std::size_t Decoder::partial_sums_bytes() const {
  std::size_t bytes = 0;
  using Group = std::vector<const LowRankLinear*>;
  for (const DecoderLayer& layer : weights_.layers) {
    for (const Group& group : {Group{&layer.query, &layer.key, &layer.value}, Group{&layer.output},
                               Group{&layer.gate, &layer.up}, Group{&layer.down}}) {
      bytes = std::max(bytes, deinfer::partial_sums_bytes(group));
    }
  }
  return bytes;
}

std::size_t Decoder::attention_scratch(const cpu::KernelTable& kernels) const {
  std::size_t bytes = 0;
  for (const Attention& attention : attention_) {
    bytes =
        std::max(bytes, attention_scratch_bytes(kernels, attention.shape, weights_.activations));
  }
  return bytes;
}

void Decoder::find_own_slots(const Batch& batch) {
  own_slots_.clear();
  if (!token_sharded_) return;
  const int run = block_size_ / share_.size;
  for (const KvSlot& slot : batch.slots) {
    const bool own = slot.offset / run == share_.rank;
    own_slots_.push_back(own ? KvSlot{slot.block, slot.offset % run} : KvSlot{-1, 0});
  }
}

void Decoder::plan(const Batch& batch, const Overlap& overlap) {
  for (Attention& attention : attention_) attention.schedule->plan(batch, overlap.tile_tokens);
  find_own_slots(batch);
  int length = 0;
  for (int position : batch.positions) length = std::max(length, position + 1);
  for (std::optional<PositionAngles>& angles : positions_) {
    if (angles) angles->reach(length);
  }
  wanted_.select(batch);
  // Over ranks, what a step exchanges is counted for all of its tokens (plan/exchanges.h).
  narrows_ = share_.size == 1 && wanted_.batch.num_tokens() < batch.num_tokens();
  if (narrows_) wanted_attention_->plan(wanted_.batch);
  states_ = {state_memory_.as<float>(), state_layers_.size() * batch.state_rows.size() *
                                            static_cast<std::size_t>(config_.hidden_size)};
}

void Decoder::keep_states(ExecutionContext& ctx, const Batch& batch, int layer) {
  auto found = std::find(state_layers_.begin(), state_layers_.end(), layer);
  auto rows = static_cast<int>(batch.state_rows.size());
  if (found == state_layers_.end() || rows == 0) return;
  float* out = state_memory_.as<float>() +
               (found - state_layers_.begin()) * rows * std::ptrdiff_t{config_.hidden_size};
  int most = rows;
  if (ctx.exchange.size() > 1) {
    most = static_cast<int>(ctx.exchange.max_bytes() / float_bytes(1, config_.hidden_size));
  }
  for (int first = 0; first < rows; first += most) {
    int count = std::min(most, rows - first);
    float* part = out + std::ptrdiff_t{first} * config_.hidden_size;
    residual_.gather_rows(ctx, count, batch.state_rows.data() + first, batch.num_tokens(), part);
    if (layer != config_.num_layers || ctx.exchange.rank() != 0) continue;
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end; ++i) {
      float* row = part + std::ptrdiff_t{i} * config_.hidden_size;
      normalize_row(ctx.kernels, row, config_.hidden_size, weights_.final_norm,
                    {row, DType::kFloat32, config_.hidden_size});
    }
  }
}

void Decoder::forward(ExecutionContext& ctx, const Batch& batch, KvCache& cache) {
  for (std::size_t rope = 0; rope < ropes_.size(); ++rope) {
    const std::size_t offset = rope * static_cast<std::size_t>(max_tokens_ * angle_cols_);
    auto [begin, end] = ctx.member.share(batch.num_tokens());
    for (int i = begin; i < end; ++i) {
      ropes_[rope].angles(batch.positions[static_cast<std::size_t>(i)],
                          cos_.as<float>() + offset + i * angle_cols_,
                          sin_.as<float>() + offset + i * angle_cols_);
    }
  }
  residual_.embed(ctx, batch.token_ids, weights_.token_embedding(), share_.vocabulary(),
                  embedding_scale(config_, weights_.activations));
  if (config_.positions == PositionKind::kLearned) {
    residual_.add_positions(ctx, batch.positions, config_.position_offset, weights_.positions);
  }
  keep_states(ctx, batch, 0);
  for (int i = 0; i < config_.num_layers; ++i) {
    const DecoderLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
    Attention& attention = attention_of(i);
    project_qkv(ctx, batch, layer, angles(attention), cache.layer(i));
    const bool narrow = narrows_ && i + 1 == config_.num_layers;
    if (narrow) keep_wanted(ctx);
    const Batch& rows = narrow ? wanted_.batch : batch;
    attention_block(ctx, narrow ? *wanted_attention_ : *attention.schedule, rows, layer,
                    latents_of(layer, attention), cache.layer(i));
    mlp_block(ctx, rows.num_tokens(), layer);
    keep_states(ctx, rows, i + 1);
  }
}

void Decoder::keep_wanted(ExecutionContext& ctx) {
  auto move_rows = [&](float* data, std::ptrdiff_t cols) {
    for (std::size_t i = 0; i < wanted_.rows.size(); ++i) {
      const auto from = wanted_.rows[i];
      const auto to = static_cast<int>(i);
      if (from != to) std::copy_n(data + from * cols, cols, data + to * cols);
    }
  };
  // Row by row, as a row moves to where another has been.
  if (ctx.member.id() == 0) move_rows(query_.as<float>(), query_cols(weights_.layers.back()));
  if (ctx.member.id() == ctx.member.size() - 1) move_rows(residual_.rows(), residual_.ld());
  ctx.member.barrier();
}

void Decoder::add_to_residual(ExecutionContext& ctx, int m, const Activations& x,
                              const LowRankLinear& linear, const Norm& norm) {
  if (norm.kind == NormKind::kNone) {
    lowrank_linear_add(ctx, m, GroupInput(x), linear, z_.view(), residual_.rows(), residual_.ld());
    return;
  }
  lowrank_linear(ctx, m, GroupInput(x), linear, z_.view(), residual_.branch(), residual_.ld());
  residual_.add_branch(ctx, m, norm);
}

RotaryAngles Decoder::angles(const Attention& attention) const {
  if (ropes_.empty()) return {};
  const std::size_t offset = attention.rope * static_cast<std::size_t>(max_tokens_ * angle_cols_);
  return {cos_.as<float>() + offset, sin_.as<float>() + offset, angle_cols_};
}

void Decoder::project_qkv(ExecutionContext& ctx, const Batch& batch, const DecoderLayer& layer,
                          const RotaryAngles& angles, const KvLayer& kv) {
  int m = batch.num_tokens();
  bool gather = gathers(ctx.step_kind, {&layer.query, &layer.key, &layer.value});
  GroupInput x = residual_.normed(ctx, m, layer.attention_norm, gather);
  QkvOutput qkv;
  qkv.q = query_.as<float>();
  qkv.ldq = query_cols(layer);
  qkv.head_dim = config_.head_dim;
  qkv.kv = kv;
  qkv.slots = layer.kv.token_sharded ? own_slots_ : batch.slots;
  if (rotates_tiles(config_)) qkv.angles = angles;
  // Of latents, only a norm over all heads wants k now.
  const bool stores_keys = !kv.k.is_latent() || config_.qk_norm == QkNormKind::kFull;
  if (config_.qk_norm != QkNormKind::kNone && stores_keys) {
    qkv.k = key_.as<float>();
    qkv.ldk = std::ptrdiff_t{layer.heads.kv_heads.size()} * config_.head_dim;
  }
  lowrank_qkv(ctx, m, x, layer.query, layer.key, layer.value, z_.view(), qkv);
  if (config_.qk_norm != QkNormKind::kNone) {
    QkNorm norm{config_.qk_norm, layer.query_norm,  layer.key_norm,
                layer.heads,     config_.num_heads, config_.num_kv_heads};
    normalize_qk(ctx, m, norm, angles, qkv);
  }
}

void Decoder::attention_block(ExecutionContext& ctx, AttentionSchedule& schedule,
                              const Batch& batch, const DecoderLayer& layer,
                              const LatentKv& latents, const KvLayer& kv) {
  schedule.run(ctx, batch, query_.as<float>(), query_cols(layer), kv, latents, attended_.view());
  add_to_residual(ctx, batch.num_tokens(), attended_.view(), layer.output,
                  layer.attention_output_norm);
}

void Decoder::mlp_block(ExecutionContext& ctx, int m, const DecoderLayer& layer) {
  bool gather = gathers(ctx.step_kind, {&layer.gate, &layer.up});
  GroupInput x = residual_.normed(ctx, m, layer.mlp_norm, gather);
  if (is_gated(config_.mlp)) {
    const bool silu = config_.mlp == MlpKind::kGatedSilu;
    lowrank_gated_mlp(ctx, m, x, layer.gate, layer.up, silu ? GateKind::kSilu : GateKind::kGeluTanh,
                      z_.view(), inner_.view());
  } else {
    lowrank_relu(ctx, m, x, layer.up, z_.view(), inner_.view());
  }
  add_to_residual(ctx, m, inner_.view(), layer.down, layer.mlp_output_norm);
}

void Decoder::logits(ExecutionContext& ctx, const Batch& batch, int first, int count, float* out) {
  const Batch& rows = rows_after(batch);
  Activations x = residual_.wanted(ctx, count, rows.logit_rows.data() + first, rows.num_tokens(),
                                   weights_.final_norm);
  output_logits(ctx, count, GroupInput(x), weights_.head, config_.logit_soft_cap, z_.view(),
                share_.vocabularies, out);
}

void Decoder::most_likely(ExecutionContext& ctx, const Batch& batch, int first, int count,
                          TokenId* tokens) {
  const Batch& rows = rows_after(batch);
  Activations x = residual_.wanted(ctx, count, rows.argmax_rows.data() + first, rows.num_tokens(),
                                   weights_.final_norm);
  output_most_likely(ctx, count, GroupInput(x), weights_.head, config_.logit_soft_cap, z_.view(),
                     share_.vocabularies, maxima_, best_value_.data(), tokens);
}

}  // namespace deinfer

// What CudaDecoder launches for the layers of a model.
#include <algorithm>

#include "base/bf16.h"
#include "model/cuda_decoder.h"
#include "model/decoder_weights.h"

namespace deinfer {

using cuda::check_launch;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;

cuda::KvPool CudaDecoder::kv_pool(int layer) const {
  const auto index = static_cast<std::size_t>(layer);
  return {k_[index].as<void>(), v_[index].as<void>(), block_size_,
          config_.num_kv_heads, config_.head_dim,     cuda::head_width(config_.head_dim)};
}

std::size_t CudaDecoder::angles_before(std::size_t rope) const {
  return rope * static_cast<std::size_t>(padded_tokens(limits_.max_tokens) * config_.head_dim / 2);
}

cuda::Rotation CudaDecoder::rotation(std::size_t rope) const {
  if (ropes_.empty()) return {};
  const std::size_t offset = angles_before(rope);
  return {cos_.as<float>() + offset, sin_.as<float>() + offset, config_.head_dim / 2};
}

void CudaDecoder::run_linear(const LinearLaunch& launch) const {
  check_launch(cuda::launch_linear(launch, stream_.get()), "linear");
}

cuda::NormLaunch CudaDecoder::norm_launch(int m, const CudaNorm& norm,
                                          const cuda::DeviceBuffer& x) const {
  cuda::NormLaunch launch;
  launch.x = x.as<float>();
  launch.ld = config_.hidden_size;
  launch.m = m;
  launch.n = config_.hidden_size;
  launch.kind = static_cast<int>(norm.kind);
  launch.eps = norm.eps;
  launch.gain = norm.gain.as<float>();
  launch.bias = norm.bias.as<float>();
  return launch;
}

void CudaDecoder::normalize(int m, const CudaNorm& norm, const int* rows, const Activations& out) {
  cuda::NormLaunch launch = norm_launch(m, norm, residual_);
  launch.rows = rows;
  launch.out = out.data.as<void>();
  launch.out_chunks = out.chunks;
  check_launch(cuda::launch_norm(launch, stream_.get()), "norm");
}

void CudaDecoder::inner(int m, const Activations& x, std::span<const CudaLinear* const> linears) {
  LinearLaunch launch;
  launch.m = m;
  int z_chunk = 0;
  for (const CudaLinear* linear : linears) {
    if (!linear->is_low_rank()) continue;
    cuda::LinearSegment& segment = launch.segments[launch.num_segments++];
    segment.first = {linear->v.data.as<void>(), x.data.as<void>(), linear->v.chunks(), x.chunks,
                     nullptr};
    segment.epilogue = LinearEpilogue::kActivation;
    segment.n = linear->v.n;
    segment.tiles = linear->v.tiles;
    segment.out = z_.data.as<bf16>() + z_chunk * cuda::kTileTokens * cuda::kTileCols;
    segment.out_chunks = z_.chunks;
    z_chunk += linear->z_chunks();
  }
  if (launch.num_segments > 0) run_linear(launch);
}

cuda::LinearFactor CudaDecoder::outer(const CudaLinear& linear, const Activations& x,
                                      int z_chunk) const {
  const void* from = x.data.as<void>();
  int chunks = x.chunks;
  if (linear.is_low_rank()) {
    from = z_.data.as<bf16>() + z_chunk * cuda::kTileTokens * cuda::kTileCols;
    chunks = z_.chunks;
  }
  return {linear.u.data.as<void>(), from, linear.u.chunks(), chunks, linear.u.bias.as<float>()};
}

LinearLaunch CudaDecoder::outer_launch(int m, const CudaLinear& linear, const Activations& x,
                                       int z_chunk) const {
  LinearLaunch launch;
  launch.m = m;
  launch.num_segments = 1;
  cuda::LinearSegment& segment = launch.segments[0];
  segment.first = outer(linear, x, z_chunk);
  segment.n = linear.u.n;
  segment.tiles = linear.u.tiles;
  return launch;
}

void CudaDecoder::add_to_residual(int m, const Activations& x, const CudaLinear& linear,
                                  const CudaNorm& norm) {
  const CudaLinear* const linears[] = {&linear};
  inner(m, x, linears);
  const bool normalizes = norm.kind != NormKind::kNone;
  LinearLaunch launch = outer_launch(m, linear, x, 0);
  cuda::LinearSegment& segment = launch.segments[0];
  segment.epilogue = normalizes ? LinearEpilogue::kFloat : LinearEpilogue::kAdd;
  segment.out = normalizes ? branch_.as<void>() : residual_.as<void>();
  segment.ld = config_.hidden_size;
  run_linear(launch);
  if (!normalizes) return;
  cuda::NormLaunch add = norm_launch(m, norm, branch_);
  add.add_to = residual_.as<float>();
  check_launch(cuda::launch_norm(add, stream_.get()), "norm of a block's output");
}

void CudaDecoder::project_qkv(int m, const CudaLayer& layer, const cuda::KvPool& kv,
                              std::size_t rope) {
  normalize(m, layer.attention_norm, nullptr, normed_);
  const CudaLinear* const linears[] = {&layer.query, &layer.key, &layer.value};
  inner(m, normed_, linears);
  const bool rotates = rotates_tiles(config_);
  const bool normalizes = config_.qk_norm != QkNormKind::kNone;
  LinearLaunch launch;
  launch.m = m;
  launch.num_segments = 3;
  launch.heads = config_.num_heads;
  launch.rotation = rotation(rope);
  launch.kv = kv;
  launch.slots = inputs(step_.offsets().slots);
  int z_chunk = 0;
  for (int i = 0; i < 3; ++i) {
    const CudaLinear& linear = *linears[i];
    cuda::LinearSegment& segment = launch.segments[i];
    segment.first = outer(linear, normed_, z_chunk);
    segment.n = linear.u.n;
    segment.tiles = linear.u.tiles;
    z_chunk += linear.z_chunks();
  }
  auto& [query, key, value] = launch.segments;
  value.epilogue = LinearEpilogue::kValue;
  if (normalizes) {
    query.epilogue = key.epilogue = LinearEpilogue::kFloat;
    query.out = raw_query_.as<void>();
    query.ld = query.n;
    key.out = raw_key_.as<void>();
    key.ld = key.n;
  } else {
    query.epilogue = rotates ? LinearEpilogue::kRotaryQuery : LinearEpilogue::kQuery;
    query.out = query_.as<void>();
    key.epilogue = rotates ? LinearEpilogue::kRotaryKey : LinearEpilogue::kKey;
  }
  run_linear(launch);
  if (!normalizes) return;
  cuda::QkNormLaunch norm;
  norm.q = raw_query_.as<float>();
  norm.k = raw_key_.as<float>();
  norm.m = m;
  norm.heads = config_.num_heads;
  norm.query_gain = layer.query_norm.gain.as<float>();
  norm.key_gain = layer.key_norm.gain.as<float>();
  norm.all_heads = config_.qk_norm == QkNormKind::kFull;
  norm.query_eps = layer.query_norm.eps;
  norm.key_eps = layer.key_norm.eps;
  norm.rotation = launch.rotation;
  norm.out = query_.as<void>();
  norm.kv = kv;
  norm.slots = launch.slots;
  check_launch(cuda::launch_qk_norm(norm, stream_.get()), "norm of q and k");
}

void CudaDecoder::attention_block(int m, const CudaLayer& layer, const cuda::KvPool& kv, int kind) {
  const AttentionKind& attention = config_.attention[static_cast<std::size_t>(kind)];
  const CudaStep::AttentionOffsets& at = step_.offsets().attention[static_cast<std::size_t>(kind)];
  cuda::AttentionLaunch launch;
  launch.step.num_tasks = inputs(at.num_tasks);
  launch.step.num_combines = inputs(at.num_combines);
  launch.step.tasks = reinterpret_cast<const cuda::AttentionTask*>(inputs(at.tasks));
  launch.step.combines = reinterpret_cast<const cuda::AttentionTask*>(inputs(at.combines));
  launch.step.sequences =
      reinterpret_cast<const cuda::AttentionSequence*>(inputs(step_.offsets().sequences));
  launch.step.tables = inputs(step_.offsets().tables);
  launch.q = query_.as<void>();
  launch.kv = kv;
  launch.heads = config_.num_heads;
  launch.window = attention.window;
  launch.scale = config_.score_scale();
  launch.soft_cap = config_.attention_soft_cap;
  launch.partial_sums = partial_sums_.as<float>();
  launch.partial_stats = partial_stats_.as<float>();
  launch.out = attended_.data.as<void>();
  launch.out_chunks = attended_.chunks;
  launch.blocks = attention_blocks_;
  check_launch(cuda::launch_attention(launch, stream_.get()), "attention");
  add_to_residual(m, attended_, layer.output, layer.attention_output_norm);
}

void CudaDecoder::mlp_block(int m, const CudaLayer& layer) {
  normalize(m, layer.mlp_norm, nullptr, normed_);
  const bool has_gate = is_gated(config_.mlp);
  const CudaLinear* const linears[] = {&layer.up, &layer.gate};
  inner(m, normed_, std::span(linears, has_gate ? 2 : 1));
  LinearLaunch launch = outer_launch(m, layer.up, normed_, 0);
  cuda::LinearSegment& segment = launch.segments[0];
  segment.epilogue = LinearEpilogue::kRelu;
  if (has_gate) {
    segment.second = segment.first;
    segment.first = outer(layer.gate, normed_, layer.up.z_chunks());
    segment.epilogue = config_.mlp == MlpKind::kGatedSilu ? LinearEpilogue::kGatedSilu
                                                          : LinearEpilogue::kGatedGelu;
  }
  segment.out = inner_.data.as<void>();
  segment.out_chunks = inner_.chunks;
  run_linear(launch);
  add_to_residual(m, inner_, layer.down, layer.mlp_output_norm);
}

void CudaDecoder::keep_states(int layer, int rows) {
  auto found = std::find(limits_.state_layers.begin(), limits_.state_layers.end(), layer);
  if (found == limits_.state_layers.end() || rows == 0) return;
  const CudaNorm none;
  const bool is_last = layer == config_.num_layers;
  cuda::NormLaunch launch = norm_launch(rows, is_last ? weights_.final_norm : none, residual_);
  launch.rows = inputs(step_.offsets().state_rows);
  launch.out_float = state_memory_.as<float>() + (found - limits_.state_layers.begin()) * rows *
                                                     std::ptrdiff_t{config_.hidden_size};
  check_launch(cuda::launch_norm(launch, stream_.get()), "hidden states");
}

void CudaDecoder::run_layers(int m, int state_rows) {
  const CudaStep::Offsets& at = step_.offsets();
  for (std::size_t i = 0; i < ropes_.size(); ++i) {
    const std::size_t offset = angles_before(i);
    cuda::RopeLaunch launch;
    launch.positions = inputs(at.positions);
    launch.m = m;
    launch.frequencies = frequencies_[i].as<float>();
    launch.half = config_.head_dim / 2;
    launch.scaling = ropes_[i].attention_scaling();
    launch.cos = cos_.as<float>() + offset;
    launch.sin = sin_.as<float>() + offset;
    check_launch(cuda::launch_rope(launch, stream_.get()), "rope");
  }
  cuda::EmbedLaunch embed;
  embed.tokens = inputs(at.tokens);
  embed.positions = inputs(at.positions);
  embed.m = m;
  embed.hidden = config_.hidden_size;
  embed.table = weights_.token_embedding().data.as<void>();
  embed.chunks = weights_.token_embedding().chunks();
  embed.scale = to_float(to_bf16(config_.embedding_scale));
  embed.positions_table = weights_.positions.data.as<void>();
  embed.offset = config_.position_offset;
  embed.x = residual_.as<float>();
  check_launch(cuda::launch_embed(embed, stream_.get()), "embedding");
  keep_states(0, state_rows);
  for (int i = 0; i < config_.num_layers; ++i) {
    const CudaLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
    const int kind = config_.attention_of(i);
    const cuda::KvPool kv = kv_pool(i);
    project_qkv(m, layer, kv, kind_rope_[static_cast<std::size_t>(kind)]);
    attention_block(m, layer, kv, kind);
    mlp_block(m, layer);
    keep_states(i + 1, state_rows);
  }
}

}  // namespace deinfer

#include "model/cuda_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/bf16.h"
#include "base/check.h"

namespace deinfer {
namespace {

using cuda::check_launch;
using cuda::kTokenPadding;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;
using cuda::tiles_of;

constexpr int kPartialRows = 32768;
constexpr int kWarpsPerMultiprocessor = 8;  // that attention wants to have work for
constexpr int kBlocksPerMultiprocessor = 4;

int padded(int tokens) { return tiles_of(tokens, kTokenPadding) * kTokenPadding; }

CudaStepLimits step_limits(const ModelConfig& config, const BatchLimits& limits, int max_sequences,
                           int block_size, int multiprocessors) {
  CudaStepLimits step;
  step.max_tokens = limits.max_tokens;
  step.max_sequences = max_sequences;
  step.max_model_len = limits.max_model_len;
  step.block_size = block_size;
  step.heads = config.num_heads;
  step.kv_heads = config.num_kv_heads;
  for (const AttentionKind& kind : config.attention) step.windows.push_back(kind.window);
  step.partial_rows = kPartialRows;
  step.parallel_warps = multiprocessors * kWarpsPerMultiprocessor;
  return step;
}

/// Tiles of columns of z that the widest group of linears with a common input needs.
int max_z_chunks(const CudaWeights& weights) {
  int chunks = std::max(weights.head.z_chunks(), 1);
  for (const CudaLayer& layer : weights.layers) {
    chunks =
        std::max({chunks, layer.query.z_chunks() + layer.key.z_chunks() + layer.value.z_chunks(),
                  layer.output.z_chunks(), layer.gate.z_chunks() + layer.up.z_chunks(),
                  layer.down.z_chunks()});
  }
  return chunks;
}

bool has_output_norms(const ModelConfig& config) {
  return !config.names.attention_output_norm.empty() || !config.names.mlp_output_norm.empty();
}

}  // namespace

CudaDecoder::CudaDecoder(const ModelConfig& config, CudaWeights weights, const BatchLimits& limits,
                         int max_sequences, int block_size, int multiprocessors,
                         cuda::DeviceStream& stream)
    : config_(config),
      weights_(std::move(weights)),
      limits_(limits),
      block_size_(block_size),
      attention_blocks_(multiprocessors * kBlocksPerMultiprocessor),
      stream_(stream),
      step_(step_limits(config, limits, max_sequences, block_size, multiprocessors)) {
  const int width = cuda::head_width(config.head_dim);
  if (width == 0) {
    fail(ErrorCode::kUnsupported, "head_dim=", config.head_dim,
         " is more than the 256 of the CUDA kernels");
  }
  const auto tokens = static_cast<std::size_t>(padded(limits.max_tokens));
  auto float_rows = [&](int cols) {
    return zeroed(tokens * static_cast<std::size_t>(cols) * sizeof(float));
  };
  host_inputs_ = cuda::PinnedBuffer(step_.capacity_bytes());
  inputs_ = zeroed(step_.capacity_bytes());
  if (config.positions == PositionKind::kRotary) {
    std::vector<RopeConfig> distinct;
    for (const AttentionKind& kind : config.attention) {
      auto found = std::find(distinct.begin(), distinct.end(), kind.rope);
      kind_rope_.push_back(static_cast<std::size_t>(found - distinct.begin()));
      if (found == distinct.end()) distinct.push_back(kind.rope);
    }
    for (const RopeConfig& rope : distinct) {
      const std::vector<float>& values =
          ropes_.emplace_back(rope, config.head_dim, limits.max_model_len).frequencies();
      cuda::DeviceBuffer& own = frequencies_.emplace_back(values.size() * sizeof(float));
      std::memcpy(host_inputs_.as<void>(), values.data(), own.size());
      stream_.upload(own.as<void>(), host_inputs_.as<void>(), own.size());
      stream_.synchronize();
    }
    const int angles = static_cast<int>(distinct.size()) * (config.head_dim / 2);
    cos_ = float_rows(angles);
    sin_ = float_rows(angles);
  } else {
    kind_rope_.assign(config.attention.size(), 0);
  }
  residual_ = float_rows(config.hidden_size);
  if (has_output_norms(config)) branch_ = float_rows(config.hidden_size);
  normed_ = activations(config.hidden_size);
  z_ = activations(max_z_chunks(weights_) * cuda::kTileCols);
  attended_ = activations(config.num_heads * config.head_dim);
  inner_ = activations(config.intermediate_size);
  query_ = zeroed(tokens * static_cast<std::size_t>(config.num_heads * width) * sizeof(bf16));
  if (config.qk_norm != QkNormKind::kNone) {
    raw_query_ = float_rows(config.num_heads * config.head_dim);
    raw_key_ = float_rows(config.num_kv_heads * config.head_dim);
  }
  partial_sums_ = zeroed(std::size_t{kPartialRows} * static_cast<std::size_t>(width) * 4);
  partial_stats_ = zeroed(std::size_t{kPartialRows} * 2 * sizeof(float));
  const std::size_t logit_bytes =
      std::size_t{kLogitRows} * static_cast<std::size_t>(config.vocab_size) * sizeof(float);
  logits_ = zeroed(logit_bytes);
  host_logits_ = cuda::PinnedBuffer(logit_bytes);
  best_ = zeroed(tokens * sizeof(TokenId));
  host_best_ = cuda::PinnedBuffer(tokens * sizeof(TokenId));
  const std::size_t state_bytes = limits.state_layers.size() *
                                  static_cast<std::size_t>(limits.max_state_rows) *
                                  static_cast<std::size_t>(config.hidden_size) * sizeof(float);
  state_memory_ = zeroed(state_bytes);
  host_states_ = cuda::PinnedBuffer(state_bytes);
  stream_.synchronize();
}

cuda::DeviceBuffer CudaDecoder::zeroed(std::size_t bytes) {
  cuda::DeviceBuffer buffer(bytes);
  stream_.clear(buffer);
  return buffer;
}

CudaDecoder::Activations CudaDecoder::activations(int cols) {
  const int chunks = tiles_of(cols, cuda::kTileCols);
  const auto elements = static_cast<std::size_t>(padded(limits_.max_tokens)) *
                        static_cast<std::size_t>(chunks * cuda::kTileCols);
  return {zeroed(elements * sizeof(bf16)), chunks};
}

std::uint64_t CudaDecoder::kv_block_bytes() const {
  return std::uint64_t{2} * sizeof(bf16) * static_cast<std::uint64_t>(config_.num_layers) *
         static_cast<std::uint64_t>(config_.num_kv_heads * block_size_) *
         static_cast<std::uint64_t>(cuda::head_width(config_.head_dim));
}

void CudaDecoder::allocate_kv_cache(std::int64_t num_blocks) {
  const std::size_t bytes = kv_block_bytes() / 2 / static_cast<std::size_t>(config_.num_layers) *
                            static_cast<std::size_t>(num_blocks);
  for (int i = 0; i < config_.num_layers; ++i) {
    k_.push_back(zeroed(bytes));
    v_.push_back(zeroed(bytes));
  }
  stream_.synchronize();
}

cuda::KvPool CudaDecoder::kv_pool(int layer) const {
  const auto index = static_cast<std::size_t>(layer);
  return {k_[index].as<void>(), v_[index].as<void>(), block_size_,
          config_.num_kv_heads, config_.head_dim,     cuda::head_width(config_.head_dim)};
}

cuda::Rotation CudaDecoder::rotation(std::size_t rope) const {
  if (ropes_.empty()) return {};
  const int half = config_.head_dim / 2;
  const std::size_t offset = rope * static_cast<std::size_t>(padded(limits_.max_tokens) * half);
  return {cos_.as<float>() + offset, sin_.as<float>() + offset, half};
}

void CudaDecoder::run_linear(const LinearLaunch& launch) const {
  check_launch(cuda::launch_linear(launch, stream_.get()), "linear");
}

void CudaDecoder::normalize(int m, const CudaNorm& norm, const int* rows, const Activations& out) {
  cuda::NormLaunch launch;
  launch.x = residual_.as<float>();
  launch.ld = config_.hidden_size;
  launch.rows = rows;
  launch.m = m;
  launch.n = config_.hidden_size;
  launch.kind = static_cast<int>(norm.kind);
  launch.eps = norm.eps;
  launch.gain = norm.gain.as<float>();
  launch.bias = norm.bias.as<float>();
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

void CudaDecoder::add_to_residual(int m, const Activations& x, const CudaLinear& linear,
                                  const CudaNorm& norm) {
  const CudaLinear* const linears[] = {&linear};
  inner(m, x, linears);
  const bool normalizes = norm.kind != NormKind::kNone;
  LinearLaunch launch;
  launch.m = m;
  launch.num_segments = 1;
  cuda::LinearSegment& segment = launch.segments[0];
  segment.first = outer(linear, x, 0);
  segment.epilogue = normalizes ? LinearEpilogue::kFloat : LinearEpilogue::kAdd;
  segment.n = linear.u.n;
  segment.tiles = linear.u.tiles;
  segment.out = normalizes ? branch_.as<void>() : residual_.as<void>();
  segment.ld = config_.hidden_size;
  run_linear(launch);
  if (!normalizes) return;
  cuda::NormLaunch add;
  add.x = branch_.as<float>();
  add.ld = config_.hidden_size;
  add.m = m;
  add.n = config_.hidden_size;
  add.kind = static_cast<int>(norm.kind);
  add.eps = norm.eps;
  add.gain = norm.gain.as<float>();
  add.bias = norm.bias.as<float>();
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
  launch.scale = config_.attention_scale;
  if (launch.scale == 0.0f) launch.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
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
  LinearLaunch launch;
  launch.m = m;
  launch.num_segments = 1;
  cuda::LinearSegment& segment = launch.segments[0];
  segment.first = outer(layer.up, normed_, 0);
  segment.epilogue = LinearEpilogue::kRelu;
  if (has_gate) {
    segment.second = segment.first;
    segment.first = outer(layer.gate, normed_, layer.up.z_chunks());
    segment.epilogue = config_.mlp == MlpKind::kGatedSilu ? LinearEpilogue::kGatedSilu
                                                          : LinearEpilogue::kGatedGelu;
  }
  segment.n = layer.up.u.n;
  segment.tiles = layer.up.u.tiles;
  segment.out = inner_.data.as<void>();
  segment.out_chunks = inner_.chunks;
  run_linear(launch);
  add_to_residual(m, inner_, layer.down, layer.mlp_output_norm);
}

void CudaDecoder::keep_states(int layer, int rows) {
  auto found = std::find(limits_.state_layers.begin(), limits_.state_layers.end(), layer);
  if (found == limits_.state_layers.end() || rows == 0) return;
  cuda::NormLaunch launch;
  launch.x = residual_.as<float>();
  launch.ld = config_.hidden_size;
  launch.rows = inputs(step_.offsets().state_rows);
  launch.m = rows;
  launch.n = config_.hidden_size;
  if (layer == config_.num_layers) {
    launch.kind = static_cast<int>(weights_.final_norm.kind);
    launch.eps = weights_.final_norm.eps;
    launch.gain = weights_.final_norm.gain.as<float>();
    launch.bias = weights_.final_norm.bias.as<float>();
  }
  launch.out_float = state_memory_.as<float>() + (found - limits_.state_layers.begin()) * rows *
                                                     std::ptrdiff_t{config_.hidden_size};
  check_launch(cuda::launch_norm(launch, stream_.get()), "hidden states");
}

void CudaDecoder::run_layers(int m, int state_rows) {
  const CudaStep::Offsets& at = step_.offsets();
  for (std::size_t i = 0; i < ropes_.size(); ++i) {
    const cuda::Rotation out = rotation(i);
    cuda::RopeLaunch launch{inputs(at.positions),          m,
                            frequencies_[i].as<float>(),   out.half,
                            ropes_[i].attention_scaling(), const_cast<float*>(out.cos),
                            const_cast<float*>(out.sin)};
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

void CudaDecoder::head(const int* rows, int count) {
  normalize(count, weights_.final_norm, rows, normed_);
  const CudaLinear* const linears[] = {&weights_.head};
  inner(count, normed_, linears);
  LinearLaunch launch;
  launch.m = count;
  launch.num_segments = 1;
  cuda::LinearSegment& segment = launch.segments[0];
  segment.first = outer(weights_.head, normed_, 0);
  segment.epilogue = LinearEpilogue::kFloat;
  segment.n = config_.vocab_size;
  segment.tiles = weights_.head.u.tiles;
  segment.out = logits_.as<void>();
  segment.ld = config_.vocab_size;
  segment.soft_cap = config_.logit_soft_cap;
  run_linear(launch);
}

void CudaDecoder::argmax(int rows) {
  for (int first = 0; first < rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, rows - first);
    head(inputs(step_.offsets().argmax_rows) + first, count);
    check_launch(cuda::launch_argmax(
                     {logits_.as<float>(), count, config_.vocab_size, best_.as<int>() + first},
                     stream_.get()),
                 "argmax");
  }
}

void CudaDecoder::run_bucket(int bucket, bool with_argmax) {
  run_layers(bucket, 0);
  if (with_argmax) argmax(bucket);
}

void CudaDecoder::forward(const Batch& batch) {
  const int m = batch.num_tokens();
  const int argmax_rows = static_cast<int>(batch.argmax_rows.size());
  const int state_rows = static_cast<int>(batch.state_rows.size());
  const bool decodes = std::all_of(batch.sequences.begin(), batch.sequences.end(),
                                   [](const BatchSequence& run) { return run.num_rows == 1; });
  const int bucket = graph_bucket(m);
  const bool has_graph = decodes && bucket > 0 && state_rows == 0;
  const std::size_t bytes =
      step_.build(batch, has_graph ? bucket : m, host_inputs_.as<std::byte>());
  stream_.upload(inputs_.as<void>(), host_inputs_.as<void>(), bytes);
  if (has_graph) {
    const std::pair<int, bool> key = {bucket, argmax_rows > 0};
    auto found = graphs_.find(key);
    if (found != graphs_.end()) {
      stream_.launch(found->second);
    } else {
      // The first step of a size runs as it is: the driver loads kernels at their first launch,
      // which is better not captured.
      run_bucket(bucket, argmax_rows > 0);
      stream_.begin_capture();
      run_bucket(bucket, argmax_rows > 0);
      graphs_.emplace(key, stream_.end_capture());
    }
  } else {
    run_layers(m, state_rows);
    argmax(argmax_rows);
  }
  tokens_ = {host_best_.as<TokenId>(), batch.argmax_rows.size()};
  if (argmax_rows > 0) {
    stream_.download(host_best_.as<void>(), best_.as<void>(), tokens_.size_bytes());
  }
  states_ = {host_states_.as<float>(), limits_.state_layers.size() * batch.state_rows.size() *
                                           static_cast<std::size_t>(config_.hidden_size)};
  if (!states_.empty()) {
    stream_.download(host_states_.as<void>(), state_memory_.as<void>(), states_.size_bytes());
  }
}

float* CudaDecoder::logits(int first, int count) {
  head(inputs(step_.offsets().logit_rows) + first, count);
  stream_.download(host_logits_.as<void>(), logits_.as<void>(),
                   static_cast<std::size_t>(count) * static_cast<std::size_t>(config_.vocab_size) *
                       sizeof(float));
  stream_.synchronize();
  return host_logits_.as<float>();
}

void CudaDecoder::finish() { stream_.synchronize(); }

}  // namespace deinfer

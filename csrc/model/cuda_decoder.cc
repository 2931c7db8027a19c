#include "model/cuda_decoder.h"

#include <algorithm>
#include <cstring>

#include "base/bf16.h"
#include "base/check.h"

namespace deinfer {
namespace {

using cuda::tiles_of;

constexpr std::size_t kPartialBytes = std::size_t{32} << 20;  // for states of splits
constexpr int kWarpsPerMultiprocessor = 8;  // that attention wants to have work for
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kLatentBlocksPerMultiprocessor = 2;

/// Where nothing of a layer's sides differs between heads, all heads share the loads of a latent.
CudaAttentionKind attention_kind(const ModelConfig& config, const RankShare& share,
                                 const CudaWeights& weights, int layer) {
  const KvForms& kv = weights.layers[static_cast<std::size_t>(layer)].kv;
  const bool shares = kv.k == KvForm::kAbsorbed && kv.v == KvForm::kAbsorbed;
  return {config.attention[static_cast<std::size_t>(config.attention_of(layer))].window,
          shares ? 1 : share.heads.kv_heads.size()};
}

/// Elements of an output of attention, at most.
int max_output_width(const ModelConfig& config, const CudaWeights& weights) {
  int width = cuda::head_width(config.head_dim);
  for (const CudaLayer& layer : weights.layers) {
    if (layer.kv.v != KvForm::kAbsorbed) continue;
    width = std::max(width, cuda::head_columns(layer.value.rank));
  }
  return width;
}

CudaStepLimits step_limits(const ModelConfig& config, const RankShare& share,
                           const CudaWeights& weights, const BatchLimits& limits, int max_sequences,
                           int block_size, int multiprocessors) {
  CudaStepLimits step;
  step.max_tokens = limits.max_tokens;
  step.max_sequences = max_sequences;
  step.max_model_len = limits.max_model_len;
  step.block_size = block_size;
  step.heads = share.heads.heads.size();
  for (int i = 0; i < config.num_layers; ++i) {
    const CudaAttentionKind kind = attention_kind(config, share, weights, i);
    if (std::find(step.attention.begin(), step.attention.end(), kind) == step.attention.end()) {
      step.attention.push_back(kind);
    }
  }
  const auto width = static_cast<std::size_t>(max_output_width(config, weights));
  step.partial_rows = static_cast<int>(kPartialBytes / (std::max<std::size_t>(width, 256) * 4));
  step.parallel_warps = multiprocessors * kWarpsPerMultiprocessor;
  step.vocabulary = config.vocab_size;
  step.history_tokens = CudaSampling::kHistoryTokens;
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

}  // namespace

CudaDecoder::CudaDecoder(const ModelConfig& config, const RankShare& share, CudaWeights weights,
                         const BatchLimits& limits, int max_sequences, int block_size,
                         int multiprocessors, DeviceCommunicator* communicator,
                         cuda::DeviceStream& stream)
    : config_(config),
      share_(share),
      weights_(std::move(weights)),
      limits_(limits),
      block_size_(block_size),
      attention_blocks_(multiprocessors * kBlocksPerMultiprocessor),
      latent_blocks_(multiprocessors * kLatentBlocksPerMultiprocessor),
      communicator_(communicator),
      stream_(stream),
      heads_(share.heads.heads.size()),
      kv_heads_(share.heads.kv_heads.size()),
      step_(
          step_limits(config, share, weights_, limits, max_sequences, block_size, multiprocessors)),
      sampling_(share.rank == 0 ? config.vocab_size : 0, padded_tokens(limits.max_tokens),
                static_cast<std::size_t>(step_.offsets().end - step_.offsets().tables), stream) {
  const int width = cuda::head_width(config.head_dim);
  if (width == 0) {
    fail(ErrorCode::kUnsupported, "head_dim=", config.head_dim,
         " is more than the 256 of the CUDA kernels");
  }
  const auto tokens = static_cast<std::size_t>(padded_tokens(limits.max_tokens));
  auto float_rows = [&](int cols) {
    return zeroed(tokens * static_cast<std::size_t>(cols) * sizeof(float));
  };
  host_inputs_ = cuda::PinnedBuffer(step_.capacity_bytes());
  inputs_ = zeroed(step_.capacity_bytes());
  const std::vector<RopeConfig> ropes = config.distinct_ropes();
  for (const AttentionKind& kind : config.attention) {
    auto found = std::find(ropes.begin(), ropes.end(), kind.rope);
    kind_rope_.push_back(static_cast<std::size_t>(found - ropes.begin()));
  }
  for (const RopeConfig& rope : ropes) {
    const std::vector<float>& values =
        ropes_.emplace_back(rope, config.head_dim, limits.max_model_len).frequencies();
    cuda::DeviceBuffer& own = frequencies_.emplace_back(values.size() * sizeof(float));
    std::memcpy(host_inputs_.as<void>(), values.data(), own.size());
    stream_.upload(own.as<void>(), host_inputs_.as<void>(), own.size());
    stream_.synchronize();
  }
  const int angles = static_cast<int>(ropes.size()) * (config.head_dim / 2);
  cos_ = float_rows(angles);
  sin_ = float_rows(angles);
  const int columns = own_columns().size();
  residual_ = float_rows(columns);
  if (config.has_output_norms()) branch_ = float_rows(columns);
  normed_ = activations(columns);
  z_ = activations(max_z_chunks(weights_) * cuda::kTileCols);
  attended_ = activations(heads_ * config.head_dim);
  inner_ = activations(share.intermediate);
  if (share.residual[0] != ResidualLayout::kReplicated ||
      share.residual[1] != ResidualLayout::kReplicated) {
    whole_ = float_rows(config.hidden_size);
    gathered_ = activations(config.hidden_size);
  }
  if (has_ranks()) squares_ = float_rows(2);
  query_ = zeroed(tokens * static_cast<std::size_t>(heads_ * width) * sizeof(bf16));
  const bool outputs_travel = has_ranks() && !share.plans[0]->merges_exchanges();
  if (config.qk_norm != QkNormKind::kNone || outputs_travel) {
    raw_query_ = float_rows(heads_ * config.head_dim);
    int key_columns = kv_heads_ * config.head_dim;
    for (const CudaLayer& layer : weights_.layers) {
      if (keeps_key_scales(layer)) key_columns = std::max(key_columns, layer.key.u.n);
    }
    raw_key_ = float_rows(key_columns);
  }
  if (outputs_travel) {
    raw_value_ = float_rows(kv_heads_ * config.head_dim);
    raw_up_ = float_rows(config.intermediate_size);
    if (is_gated(config.mlp)) raw_gate_ = float_rows(config.intermediate_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    std::size_t place = 0;
    while (step_.attention(place) != attention_kind(config, share, weights_, i)) ++place;
    layer_attention_.push_back(place);
  }
  allocate_for_latents();
  const auto partial_rows = static_cast<std::size_t>(step_.partial_rows());
  partial_sums_ = zeroed(
      partial_rows * static_cast<std::size_t>(max_output_width(config, weights_)) * sizeof(float));
  partial_stats_ = zeroed(partial_rows * 2 * sizeof(float));
  const bool is_first = share.rank == 0;
  const int logits = is_first ? config.vocab_size : share.vocabulary().size();
  const std::size_t logit_bytes =
      std::size_t{kLogitRows} * static_cast<std::size_t>(logits) * sizeof(float);
  logits_ = zeroed(logit_bytes);
  if (is_first) host_logits_ = cuda::PinnedBuffer(logit_bytes);
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
  // Products of a rank's own tokens begin at any tile of tokens, and read whole groups of tiles.
  const int rows = padded_tokens(limits_.max_tokens) + (has_ranks() ? cuda::kTokenPadding : 0);
  const auto elements =
      static_cast<std::size_t>(rows) * static_cast<std::size_t>(chunks * cuda::kTileCols);
  return {zeroed(elements * sizeof(bf16)), chunks};
}

std::uint64_t CudaDecoder::kv_block_bytes() const {
  std::uint64_t token = 0;
  for (int i = 0; i < config_.num_layers; ++i) {
    const KvBytes bytes = kv_token_bytes(i);
    token += bytes.k + bytes.v;
  }
  return token * static_cast<std::uint64_t>(block_size_);
}

void CudaDecoder::allocate_kv_cache(std::int64_t num_blocks) {
  const std::size_t places =
      static_cast<std::size_t>(num_blocks) * static_cast<std::size_t>(block_size_);
  for (int i = 0; i < config_.num_layers; ++i) {
    const KvBytes token = kv_token_bytes(i);
    const bool scales = keeps_key_scales(weights_.layers[static_cast<std::size_t>(i)]);
    const std::size_t scale_bytes = scales ? sizeof(float) : 0;
    k_.push_back(zeroed(places * (token.k - scale_bytes)));
    key_scales_.push_back(zeroed(places * scale_bytes));
    v_.push_back(zeroed(places * token.v));
  }
  stream_.synchronize();
}

cuda::Borders cuda_borders(const std::vector<Range>& shares) {
  cuda::Borders borders;
  borders.at[0] = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) borders.at[i + 1] = shares[i].end;
  return borders;
}

Range CudaDecoder::own_columns() const {
  if (layout() != ResidualLayout::kHiddenShards) return {0, config_.hidden_size};
  return share_.hidden[static_cast<std::size_t>(share_.rank)];
}

Range CudaDecoder::own_rows(int m) const {
  if (layout() != ResidualLayout::kTokenShards) return {0, m};
  return split(m, share_.size, share_.rank);
}

cuda::Borders CudaDecoder::row_owners(int m) const {
  cuda::Borders borders;
  borders.at[0] = 0;
  for (int r = 0; r < share_.size; ++r) borders.at[r + 1] = split(m, share_.size, r).end;
  return borders;
}

void CudaDecoder::join() {
  if (!has_ranks()) return;
  join_norm_terms(weights_, *communicator_, stream_);
  communicator_->open(exchange_bytes(), stream_);
}

void CudaDecoder::synchronize() {
  has_ranks() ? communicator_->synchronize() : stream_.synchronize();
}

void CudaDecoder::run_bucket(int bucket, Choice choice) {
  run_layers(bucket, 0);
  choose(bucket, choice);
  if (has_ranks()) communicator_->make_even();
}

/// A decode step of `bucket` tokens, by its graph.
void CudaDecoder::run_recorded(int bucket, Choice choice) {
  const std::pair<int, Choice> key = {bucket, choice};
  auto found = graphs_.find(key);
  if (found != graphs_.end()) {
    tokens_in_step_ = bucket;
    if (has_ranks()) communicator_->count_all(found->second.exchanges);
    return stream_.launch(found->second.graph);
  }
  // The first step of a size runs as it is: the driver loads kernels at their first launch, which
  // is better not captured. It also allocates memory then and with a graph, which may wait for
  // kernels; so no rank has any that wait for another rank.
  run_bucket(bucket, choice);
  if (has_ranks() && communicator_->lockstep()) return;
  RecordedStep recorded;
  if (has_ranks()) {
    synchronize();
    communicator_->barrier();
    communicator_->begin_log();
  }
  stream_.begin_capture();
  run_bucket(bucket, choice);
  recorded.graph = stream_.end_capture();
  if (has_ranks()) {
    recorded.exchanges = communicator_->end_log();
    communicator_->barrier();
  }
  graphs_.emplace(key, std::move(recorded));
}

void CudaDecoder::forward(const Batch& batch) {
  const int m = batch.num_tokens();
  const int argmax_rows = static_cast<int>(batch.argmax_rows.size());
  const int sampled_rows = CudaStep::num_sampled(batch);
  const Choice choice = sampled_rows > 0  ? Choice::kSampled
                        : argmax_rows > 0 ? Choice::kMostLikely
                                          : Choice::kNone;
  const int state_rows = static_cast<int>(batch.state_rows.size());
  const bool decodes = std::all_of(batch.sequences.begin(), batch.sequences.end(),
                                   [](const BatchSequence& run) { return run.num_rows == 1; });
  kind_ = decodes ? StepKind::kDecode : StepKind::kPrefill;
  const int bucket = graph_bucket(m);
  const bool has_graph = decodes && bucket > 0 && state_rows == 0;
  const std::size_t bytes =
      step_.build(batch, has_graph ? bucket : m, host_inputs_.as<std::byte>());
  stream_.upload(inputs_.as<void>(), host_inputs_.as<void>(), bytes);
  if (has_graph) {
    run_recorded(bucket, choice);
  } else {
    run_layers(m, state_rows);
    choose(std::max(sampled_rows, argmax_rows), choice);
    if (has_ranks()) communicator_->make_even();
  }
  if (share_.rank != 0) return;
  tokens_ = {host_best_.as<TokenId>(), batch.argmax_rows.size()};
  int reported = 0;
  for (const SampledRow& row : batch.sampled) reported += std::max(row.top, 0);
  sampling_.download(sampled_rows, reported);
  if (choice == Choice::kMostLikely) {
    stream_.download(host_best_.as<void>(), best_.as<void>(), tokens_.size_bytes());
  }
  states_ = {host_states_.as<float>(), limits_.state_layers.size() * batch.state_rows.size() *
                                           static_cast<std::size_t>(config_.hidden_size)};
  if (!states_.empty()) {
    stream_.download(host_states_.as<void>(), state_memory_.as<void>(), states_.size_bytes());
  }
}

void CudaDecoder::finish() {
  synchronize();
  // Rows of which only the most likely token is wanted come behind the batch's sampled ones.
  const std::span<const cuda::SampledToken> sampled = sampling_.tokens();
  if (sampled.empty()) return;
  const std::size_t first = sampled.size() - tokens_.size();
  for (std::size_t i = 0; i < tokens_.size(); ++i) tokens_[i] = sampled[first + i].token;
}

}  // namespace deinfer

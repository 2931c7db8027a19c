#include "model/cuda_decoder.h"

#include <algorithm>
#include <cstring>

#include "base/bf16.h"
#include "base/check.h"

namespace deinfer {
namespace {

using cuda::check_launch;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;
using cuda::tiles_of;

constexpr int kPartialRows = 32768;
constexpr int kWarpsPerMultiprocessor = 8;  // that attention wants to have work for
constexpr int kBlocksPerMultiprocessor = 4;

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

CudaDecoder::CudaDecoder(const ModelConfig& config, CudaWeights weights, const BatchLimits& limits,
                         int max_sequences, int block_size, int multiprocessors,
                         cuda::DeviceStream& stream)
    : config_(config),
      weights_(std::move(weights)),
      limits_(limits),
      block_size_(block_size),
      attention_blocks_(multiprocessors * kBlocksPerMultiprocessor),
      stream_(stream),
      step_(step_limits(config, limits, max_sequences, block_size, multiprocessors)),
      sampling_(config.vocab_size, padded_tokens(limits.max_tokens),
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
  residual_ = float_rows(config.hidden_size);
  if (config.has_output_norms()) branch_ = float_rows(config.hidden_size);
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
  const auto elements = static_cast<std::size_t>(padded_tokens(limits_.max_tokens)) *
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

void CudaDecoder::head(const int* rows, int count) {
  normalize(count, weights_.final_norm, rows, normed_);
  const CudaLinear* const linears[] = {&weights_.head};
  inner(count, normed_, linears);
  LinearLaunch launch = outer_launch(count, weights_.head, normed_, 0);
  cuda::LinearSegment& segment = launch.segments[0];
  segment.epilogue = LinearEpilogue::kFloat;
  segment.out = logits_.as<void>();
  segment.ld = config_.vocab_size;
  segment.soft_cap = config_.logit_soft_cap;
  run_linear(launch);
}

void CudaDecoder::choose(int rows, Choice choice) {
  const CudaStep::Offsets& at = step_.offsets();
  const bool samples = choice == Choice::kSampled;
  for (int first = 0; choice != Choice::kNone && first < rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, rows - first);
    head(inputs(samples ? at.sampled_rows : at.argmax_rows) + first, count);
    if (samples) {
      sampling_.launch(logits_.as<float>(),
                       reinterpret_cast<const cuda::SampleRow*>(inputs(at.samples)),
                       inputs(at.tables), first, count);
      continue;
    }
    check_launch(cuda::launch_argmax(
                     {logits_.as<float>(), count, config_.vocab_size, best_.as<int>() + first},
                     stream_.get()),
                 "argmax");
  }
}

void CudaDecoder::run_bucket(int bucket, Choice choice) {
  run_layers(bucket, 0);
  choose(bucket, choice);
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
  const int bucket = graph_bucket(m);
  const bool has_graph = decodes && bucket > 0 && state_rows == 0;
  const std::size_t bytes =
      step_.build(batch, has_graph ? bucket : m, host_inputs_.as<std::byte>());
  stream_.upload(inputs_.as<void>(), host_inputs_.as<void>(), bytes);
  if (has_graph) {
    const std::pair<int, Choice> key = {bucket, choice};
    auto found = graphs_.find(key);
    if (found != graphs_.end()) {
      stream_.launch(found->second);
    } else {
      // The first step of a size runs as it is: the driver loads kernels at their first launch,
      // which is better not captured.
      run_bucket(bucket, choice);
      stream_.begin_capture();
      run_bucket(bucket, choice);
      graphs_.emplace(key, stream_.end_capture());
    }
  } else {
    run_layers(m, state_rows);
    choose(std::max(sampled_rows, argmax_rows), choice);
  }
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

float* CudaDecoder::logits(int first, int count) {
  head(inputs(step_.offsets().logit_rows) + first, count);
  stream_.download(host_logits_.as<void>(), logits_.as<void>(),
                   static_cast<std::size_t>(count) * static_cast<std::size_t>(config_.vocab_size) *
                       sizeof(float));
  stream_.synchronize();
  return host_logits_.as<float>();
}

void CudaDecoder::finish() {
  stream_.synchronize();
  // Rows of which only the most likely token is wanted come behind the batch's sampled ones.
  const std::span<const cuda::SampledToken> sampled = sampling_.tokens();
  if (sampled.empty()) return;
  const std::size_t first = sampled.size() - tokens_.size();
  for (std::size_t i = 0; i < tokens_.size(); ++i) tokens_[i] = sampled[first + i].token;
}

}  // namespace deinfer

// A decoder-only transformer, one rank's part: every linear dense or low-rank.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "model/decoder_weights.h"
#include "model/position_angles.h"
#include "ops/attention.h"
#include "ops/batch.h"
#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/lowrank_linear.h"
#include "ops/residual_stream.h"

namespace deinfer {

/// The most a batch may hold.
struct BatchLimits {
  int max_tokens = 0;
  int max_model_len = 0;
  std::vector<int> state_layers = {};  // hidden states that are kept of a batch's state_rows
  int max_state_rows = 0;
  int block_size = 16;  // of the KV cache
};

/// Runs batches. Everything but plan() is collective over the team.
class Decoder {
 public:
  /// Rows that one call of logits() or most_likely() computes at most.
  static constexpr int kLogitRows = 128;

  Decoder(const ModelConfig& config, const RankShare& share, DecoderWeights weights,
          const BatchLimits& limits, int num_threads);

  /// Completes the weights by what ranks know of theirs; all ranks must call it before forward().
  void share_norm_terms(ThreadTeam& team, Communicator& communicator) {
    deinfer::share_norm_terms(weights_, share_, team, communicator);
  }

  /// Bytes of the largest contribution to an exchange between ranks that `config` needs; kv_forms
  /// as load_decoder().
  static std::size_t exchange_bytes(const ModelConfig& config, const RankShare& share,
                                    const std::vector<KvForms>& kv_forms, int max_tokens);
  /// Rows of logits() and most_likely() that fit an exchange of so many bytes.
  int logit_rows(std::size_t exchange_bytes) const;

  /// Prepares for `batch` (at most max_tokens tokens), which will run with this overlap; call it on
  /// one thread before forward().
  void plan(const Batch& batch, const Overlap& overlap);

  /// Writes K and V of all tokens and computes the final hidden states of those whose logits, or
  /// most likely token, are wanted.
  void forward(ExecutionContext& ctx, const Batch& batch, KvCache& cache);

  /// logits[i, vocab] (fp32) of batch.logit_rows[first + i] for i in [0, count), after forward(),
  /// on rank 0; `out` is null on other ranks.
  void logits(ExecutionContext& ctx, const Batch& batch, int first, int count, float* out);

  /// tokens[i] = the most likely token of batch.argmax_rows[first + i] for i in [0, count), the
  /// lowest of equally likely ones, after forward(), on rank 0.
  void most_likely(ExecutionContext& ctx, const Batch& batch, int first, int count,
                   TokenId* tokens);

  /// Hidden states [state_layers, batch.state_rows, hidden] (fp32) of the last forward(), on rank
  /// 0. Numbered as transformers does: 0 is what enters the first block, i what leaves block i, and
  /// the last, num_layers, has passed the final norm.
  std::span<const float> hidden_states() const { return states_; }

  KvCacheConfig kv_cache_config(std::int64_t num_blocks) const;
  /// Bytes of ExecutionContext::partial_sums.
  std::size_t partial_sums_bytes() const;
  std::size_t attention_scratch(const cpu::KernelTable& kernels) const;
  const ModelConfig& config() const { return config_; }
  const RankShare& share() const { return share_; }
  const DecoderWeights& weights() const { return weights_; }

 private:
  /// The attention of layers of a kind that keep K and V in the same forms.
  struct Attention {
    int kind = 0;
    AttentionShape shape;
    std::size_t rope = 0;  // its place in ropes_
    std::optional<AttentionSchedule> schedule;
  };

  /// Groups the layers into attention_.
  void make_attention(int num_threads);
  /// Of token-sharded layers, the slots that are on this rank.
  void find_own_slots(const Batch& batch);
  Attention& attention_of(int layer) {
    return attention_[layer_attention_[static_cast<std::size_t>(layer)]];
  }
  LatentKv latents_of(const DecoderLayer& layer, const Attention& attention) const;
  /// q, and K and V in the cache.
  void project_qkv(ExecutionContext& ctx, const Batch& batch, const DecoderLayer& layer,
                   const RotaryAngles& angles, const KvLayer& kv);
  /// Moves the wanted rows of q and of the residual stream to the front.
  void keep_wanted(ExecutionContext& ctx);
  void attention_block(ExecutionContext& ctx, AttentionSchedule& schedule, const Batch& batch,
                       const DecoderLayer& layer, const LatentKv& latents, const KvLayer& kv);
  void mlp_block(ExecutionContext& ctx, int m, const DecoderLayer& layer);
  /// residual += norm(linear(x)).
  void add_to_residual(ExecutionContext& ctx, int m, const Activations& x,
                       const LowRankLinear& linear, const Norm& norm);
  /// Keeps the hidden states of `layer`, if they are wanted.
  void keep_states(ExecutionContext& ctx, const Batch& batch, int layer);
  /// Of the batch, as a layer's kind of attention turns them.
  RotaryAngles angles(const Attention& attention) const;
  std::ptrdiff_t query_cols(const DecoderLayer& layer) const {
    return std::ptrdiff_t{layer.heads.heads.size()} * config_.head_dim;
  }
  /// The batch as it is after forward().
  const Batch& rows_after(const Batch& batch) const { return narrows_ ? wanted_.batch : batch; }

  ModelConfig config_;
  RankShare share_;
  DecoderWeights weights_;
  std::vector<Rope> ropes_;                               // those that differ
  std::vector<std::optional<PositionAngles>> positions_;  // of the ropes of rebuilt keys
  std::vector<Attention> attention_;
  std::vector<std::size_t> layer_attention_;  // of each layer, its place in attention_
  int block_size_;
  bool token_sharded_;             // some layers
  std::vector<KvSlot> own_slots_;  // of the batch, in these; -1: other ranks'
  WantedRows wanted_;
  std::optional<AttentionSchedule> wanted_attention_;  // of the last layer
  bool narrows_ = false;                               // that layer, to the wanted rows
  int max_tokens_;
  int angle_cols_;    // head_dim / 2, padded to 16
  Buffer cos_, sin_;  // [ropes, max_tokens, angle_cols]
  Buffer query_;      // [max_tokens, heads, head_dim] fp32
  Buffer key_;        // [max_tokens, kv_heads, head_dim] fp32; empty without norm of q and k
  ResidualStream residual_;
  ActivationBuffer attended_, inner_, z_;
  std::vector<RowMaximum> maxima_;  // per thread, of kLogitRows rows
  std::vector<float> best_value_;   // [kLogitRows]
  std::vector<int> state_layers_;
  Buffer state_memory_;            // [state_layers, max_state_rows, hidden]
  std::span<const float> states_;  // the part of the last plan()
};

}  // namespace deinfer

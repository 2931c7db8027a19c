// One rank's part of a decoder on a CUDA device: the models of model/decoder.h, in bf16 (weights:
// or int8), divided as its plans say; exchanges are launches like any other
// (comm/device_communicator.h).
//
// Decode steps are graphs, captured after the first step of their size: whatever changes from step
// to step lies in device memory (cuda_step.h). A token's results have the same bits in any batch.
#pragma once

#include <map>
#include <span>
#include <vector>

#include "comm/device_communicator.h"
#include "kernels/cuda/latents.h"
#include "model/cuda_sampling.h"
#include "model/cuda_step.h"
#include "model/cuda_weights.h"
#include "model/decoder.h"

namespace deinfer {

/// Floats of a row that begins at a multiple of 16 bytes.
constexpr int padded_floats(int count) { return (count + 3) / 4 * 4; }
/// Of ranges that follow one another.
cuda::Borders cuda_borders(const std::vector<Range>& shares);

/// Of K and V of a layer.
struct KvBytes {
  std::uint64_t k = 0, v = 0;
};

class CudaDecoder {
 public:
  /// Rows that one call of logits() computes at most.
  static constexpr int kLogitRows = CudaSampling::kRows;

  /// Throws kUnsupported for heads that the kernels are not compiled for. All methods are to be
  /// called on threads whose device is the stream's. `communicator`: null for one rank.
  CudaDecoder(const ModelConfig& config, const RankShare& share, CudaWeights weights,
              const BatchLimits& limits, int max_sequences, int block_size, int multiprocessors,
              DeviceCommunicator* communicator, cuda::DeviceStream& stream);

  /// Completes what the other ranks have a part in; all ranks must call it before forward().
  void join();

  /// Bytes of a token's K and V in a layer, where both are kept.
  std::uint64_t dense_kv_token_bytes() const;
  /// Bytes that a layer keeps of a token.
  KvBytes kv_token_bytes(int layer) const;
  /// Bytes of one block of the KV cache over all layers.
  std::uint64_t kv_block_bytes() const;
  void allocate_kv_cache(std::int64_t num_blocks);

  /// Starts a batch: K and V of all tokens, the most likely tokens of argmax_rows, the choice and
  /// report of sampled rows, the states of state_rows, and whatever logits() needs. The batch may
  /// change when finish() or logits() has returned.
  void forward(const Batch& batch);
  /// logits[count, vocab] of batch.logit_rows[first ..], in host memory until the next call, on
  /// rank 0; null on the others.
  float* logits(int first, int count);
  /// Waits for all that forward() started. As forward() and logits() throws what
  /// DeviceCommunicator::synchronize() does.
  void finish();

  /// After finish(), on rank 0.
  std::span<const TokenId> most_likely() const { return tokens_; }
  /// Of the batch's sampled rows, likewise; reported tokens of all in order.
  std::span<const cuda::SampledToken> sampled() const { return sampling_.tokens(); }
  std::span<const cuda::ReportedToken> reported() const { return sampling_.reported(); }
  bool samples() const { return sampling_.available(); }
  /// As Decoder::hidden_states(), after finish().
  std::span<const float> hidden_states() const { return states_; }
  const CudaWeights& weights() const { return weights_; }
  int num_graphs() const { return static_cast<int>(graphs_.size()); }

 private:
  /// Device memory of activations.
  struct Activations {
    cuda::DeviceBuffer data;
    int chunks = 0;
  };
  /// What a group of linears with a common input reads.
  struct Input {
    const Activations* x = nullptr;         // what this rank has of it
    const Activations* gathered = nullptr;  // all of it, for linears that want that
    const CudaNorm* completes = nullptr;    // the norm that z completes, if any
  };
  /// cos and sin, [., head_dim / 2].
  struct Angles {
    cuda::DeviceBuffer cos, sin;
  };
  struct RecordedStep {
    cuda::Graph graph;
    ExchangeLog exchanges;
  };
  using Linears = std::span<const CudaLinear* const>;

  Activations activations(int cols);
  cuda::DeviceBuffer zeroed(std::size_t bytes);
  const int* inputs(std::int64_t offset) const { return inputs_.as<int>() + offset; }
  /// Waits for the stream, and says whether the other ranks came.
  void synchronize();

  // cuda_layers.cc
  /// All layers for m tokens; the rows whose states are kept.
  void run_layers(int m, int state_rows);
  /// What is wanted of the rows that end a step: nothing, their most likely tokens, or sampling.
  enum class Choice { kNone, kMostLikely, kSampled };
  /// What the graph of a size does.
  void run_bucket(int bucket, Choice choice);
  void run_recorded(int bucket, Choice choice);
  void project_qkv(int m, int layer);
  void normalize_qk(int m, int layer, const cuda::LinearLaunch& launch, bool has_v);
  void attention_block(int m, int layer);
  /// Attention of a layer, as with K and V in its pool.
  cuda::AttentionLaunch attention_launch(int layer) const;
  void mlp_block(int m, const CudaLayer& layer);
  void add_to_residual(int m, const Activations& x, const CudaLinear& linear, const CudaNorm& norm);
  /// squares_[m, count] = the sums over ranks of the statistics that they have written to send.
  void sum_squares(int m, int count, const char* name);
  void add_branch(int m, const CudaNorm& norm);
  void run_linear(const cuda::LinearLaunch& launch) const;
  /// A norm of m rows of x[., columns]; where they go is left to fill in.
  cuda::NormLaunch norm_launch(int m, const CudaNorm& norm, const cuda::DeviceBuffer& x) const;
  void run_norm(const cuda::NormLaunch& launch) const;
  cuda::KvPool kv_pool(int layer) const;
  cuda::Rotation rotation(std::size_t rope) const;
  /// Numbers in cos_ and sin_ before those of a rotation.
  std::size_t angles_before(std::size_t rope) const;

  // cuda_latents.cc
  cuda::KvPool key_pool(int layer) const;
  cuda::KvPool value_pool(int layer) const;
  /// Whether a norm over all heads leaves a number per key.
  bool keeps_key_scales(const CudaLayer& layer) const;
  void allocate_for_latents();
  void make_angles(std::size_t rope);
  void store_latents(int m, int layer);
  /// attended_ = attention of a layer of which some side is latent.
  void attend_to_latents(int m, int layer);

  // cuda_groups.cc
  /// norm(x) of m rows as `group` reads it.
  Input normed(int m, const CudaNorm& norm, Linears group);
  void gather_columns(int m, const CudaNorm& norm);
  /// z of the linears that have factors, one after another, exchanged as their plan says.
  void inner(int m, const Input& input, Linears linears);
  void receive_z(int m, const Input& input, Linears linears, Exchange exchange);
  void gather_z(int m, Linears linears);
  /// The output factor of a linear and what it reads, of the tokens from tile `token_tile` on; its
  /// z is at `z_chunk`.
  cuda::LinearFactor outer(const CudaLinear& linear, const Input& input, int z_chunk,
                           int token_tile = 0) const;
  /// The product of one linear for the rows `tokens`; its epilogue is left to fill in.
  cuda::LinearLaunch outer_launch(Range tokens, const CudaLinear& linear, const Input& input,
                                  int z_chunk) const;
  /// out (+)= the outputs of a linear that travel, of what this rank keeps of them.
  void exchange_output(int m, const CudaLinear& linear, const Input& input, int z_chunk,
                       cuda::ReduceSink sink, float* out, int ld);
  /// A sum over ranks of m rows: `args`, but for the exchange, of all rows and columns where it is
  /// an all-reduce.
  void reduce(Collective kind, int m, std::size_t bytes, const char* name, cuda::ReduceLaunch args);

  // cuda_ends.cc
  void embed(int m);
  /// out[count, hidden] = whole rows of the residual stream, `rows` in device memory, on rank 0 or
  /// on all.
  void gather_rows(const int* rows, int count, int m, bool everywhere, const char* name,
                   float* out);
  void keep_states(int layer, int rows, int m);
  /// What the output factor of the head reads for rows that are listed in device memory.
  Input head_input(const int* rows, int count);
  /// out[count, .], rows ld apart = the logits of this rank's part of the vocabulary.
  void head(const Input& input, int count, float* out, std::int64_t ld);
  /// On rank 0: logits_[count, vocabulary] of rows that are listed in device memory.
  void whole_logits(const int* rows, int count);
  /// What is wanted of the rows that the step lists for it.
  void choose(int rows, Choice choice);
  void argmax(int rows);
  void sample(int rows);

  /// The largest contribution to an exchange.
  std::size_t exchange_bytes() const;
  /// Of the step: the columns of the residual stream that this rank has, and its rows of m.
  ResidualLayout layout() const { return share_.residual[static_cast<std::size_t>(kind_)]; }
  Range own_columns() const;
  Range own_rows(int m) const;
  cuda::Borders row_owners(int m) const;
  bool has_ranks() const { return communicator_ != nullptr; }
  float* floats_to_send() const { return reinterpret_cast<float*>(communicator_->send()); }

  ModelConfig config_;
  RankShare share_;
  CudaWeights weights_;
  BatchLimits limits_;
  int block_size_;
  int attention_blocks_, latent_blocks_;
  DeviceCommunicator* communicator_;
  cuda::DeviceStream& stream_;
  int heads_, kv_heads_;  // of this rank
  CudaStep step_;
  CudaSampling sampling_;  // of rank 0
  StepKind kind_ = StepKind::kDecode;
  int tokens_in_step_ = 0;  // of the graph, where one runs
  cuda::PinnedBuffer host_inputs_;
  cuda::DeviceBuffer inputs_;
  std::vector<Rope> ropes_;  // those that differ
  std::vector<cuda::DeviceBuffer> frequencies_;
  std::vector<std::size_t> kind_rope_;        // of ModelConfig::attention, the place in ropes_
  std::vector<std::size_t> layer_attention_;  // of every layer, the place in CudaStepLimits
  cuda::DeviceBuffer cos_, sin_;              // [ropes, max_tokens, head_dim / 2]
  cuda::DeviceBuffer residual_;               // [max_tokens, own columns] fp32
  cuda::DeviceBuffer branch_;                 // likewise, where blocks' outputs are normalised
  cuda::DeviceBuffer squares_;                // [max_tokens, 2], of norms over several ranks
  cuda::DeviceBuffer whole_;  // [max_tokens, hidden] fp32, of sharded residual streams
  Activations normed_, z_, attended_, inner_;
  Activations gathered_;                    // likewise
  cuda::DeviceBuffer query_;                // [max_tokens, heads, head_width]
  cuda::DeviceBuffer raw_query_, raw_key_;  // fp32, before norms of q and k, or where q travels
  cuda::DeviceBuffer raw_value_, raw_gate_, raw_up_;  // fp32, where outputs travel
  // Of latents: queries by heads and U^T of them, [max_tokens, heads, r]; sums of p z by heads; the
  // angles of all positions, of ropes_, where keys are rebuilt.
  Activations head_queries_;
  cuda::DeviceBuffer absorbed_query_, latent_totals_;
  Activations latent_outputs_;
  std::vector<Angles> all_angles_;
  cuda::DeviceBuffer partial_sums_, partial_stats_;
  cuda::DeviceBuffer logits_;        // [kLogitRows, vocab]; but for rank 0 its own part of it
  cuda::DeviceBuffer best_;          // [max_tokens]
  cuda::DeviceBuffer state_memory_;  // [state_layers, max_state_rows, hidden]
  cuda::PinnedBuffer host_logits_, host_best_, host_states_;
  std::vector<cuda::DeviceBuffer> k_, v_, key_scales_;     // per layer
  std::map<std::pair<int, Choice>, RecordedStep> graphs_;  // of numbers of tokens
  std::span<TokenId> tokens_;
  std::span<const float> states_;
};

}  // namespace deinfer

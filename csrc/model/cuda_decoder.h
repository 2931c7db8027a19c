// A decoder on a CUDA device, whole on one rank: the models of model/decoder.h, in bf16.
//
// Decode steps are graphs, captured after the first step of their size: whatever changes from step
// to step lies in device memory (cuda_step.h). A token's results have the same bits in any batch.
#pragma once

#include <map>
#include <span>
#include <vector>

#include "model/cuda_sampling.h"
#include "model/cuda_step.h"
#include "model/cuda_weights.h"
#include "model/decoder.h"

namespace deinfer {

class CudaDecoder {
 public:
  /// Rows that one call of logits() computes at most.
  static constexpr int kLogitRows = CudaSampling::kRows;

  /// Throws kUnsupported for heads that the kernels are not compiled for. All methods are to be
  /// called on threads whose device is the stream's.
  CudaDecoder(const ModelConfig& config, CudaWeights weights, const BatchLimits& limits,
              int max_sequences, int block_size, int multiprocessors, cuda::DeviceStream& stream);

  /// Bytes of one block of the KV cache over all layers.
  std::uint64_t kv_block_bytes() const;
  void allocate_kv_cache(std::int64_t num_blocks);

  /// Starts a batch: K and V of all tokens, the most likely tokens of argmax_rows, the choice and
  /// report of sampled rows, the states of state_rows, and whatever logits() needs. The batch may
  /// change when finish() or logits() has returned.
  void forward(const Batch& batch);
  /// logits[count, vocab] of batch.logit_rows[first ..], in host memory until the next call.
  float* logits(int first, int count);
  /// Waits for all that forward() started.
  void finish();

  /// After finish().
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

  Activations activations(int cols);
  cuda::DeviceBuffer zeroed(std::size_t bytes);
  const int* inputs(std::int64_t offset) const { return inputs_.as<int>() + offset; }

  /// All layers for m tokens; the rows whose states are kept.
  void run_layers(int m, int state_rows);
  /// What is wanted of the rows that end a step: nothing, their most likely tokens, or sampling.
  enum class Choice { kNone, kMostLikely, kSampled };
  /// What the graph of a size does.
  void run_bucket(int bucket, Choice choice);
  void choose(int rows, Choice choice);
  void project_qkv(int m, const CudaLayer& layer, const cuda::KvPool& kv, std::size_t rope);
  void attention_block(int m, const CudaLayer& layer, const cuda::KvPool& kv, int kind);
  void mlp_block(int m, const CudaLayer& layer);
  void add_to_residual(int m, const Activations& x, const CudaLinear& linear, const CudaNorm& norm);
  void keep_states(int layer, int rows);
  void normalize(int m, const CudaNorm& norm, const int* rows, const Activations& out);
  /// Logits of the `count` rows that are listed at `rows` in device memory.
  void head(const int* rows, int count);
  /// A segment of a linear that reads x, or z at `z_chunk` where it is low-rank.
  cuda::LinearFactor outer(const CudaLinear& linear, const Activations& x, int z_chunk) const;
  /// The product of one linear; its epilogue and output are left to fill in.
  cuda::LinearLaunch outer_launch(int m, const CudaLinear& linear, const Activations& x,
                                  int z_chunk) const;
  /// A norm of m rows of x[., hidden]; where they go is left to fill in.
  cuda::NormLaunch norm_launch(int m, const CudaNorm& norm, const cuda::DeviceBuffer& x) const;
  /// z of the linears that have factors, one after another. They read x.
  void inner(int m, const Activations& x, std::span<const CudaLinear* const> linears);
  void run_linear(const cuda::LinearLaunch& launch) const;
  cuda::KvPool kv_pool(int layer) const;
  cuda::Rotation rotation(std::size_t rope) const;
  /// Numbers in cos_ and sin_ before those of a rotation.
  std::size_t angles_before(std::size_t rope) const;

  ModelConfig config_;
  CudaWeights weights_;
  BatchLimits limits_;
  int block_size_;
  int attention_blocks_;
  cuda::DeviceStream& stream_;
  CudaStep step_;
  CudaSampling sampling_;
  cuda::PinnedBuffer host_inputs_;
  cuda::DeviceBuffer inputs_;
  std::vector<Rope> ropes_;  // those that differ
  std::vector<cuda::DeviceBuffer> frequencies_;
  std::vector<std::size_t> kind_rope_;  // of ModelConfig::attention, the place in ropes_
  cuda::DeviceBuffer cos_, sin_;        // [ropes, max_tokens, head_dim / 2]
  cuda::DeviceBuffer residual_;         // [max_tokens, hidden] fp32
  cuda::DeviceBuffer branch_;           // likewise, where blocks' outputs are normalised
  Activations normed_, z_, attended_, inner_;
  cuda::DeviceBuffer query_;                // [max_tokens, heads, head_width]
  cuda::DeviceBuffer raw_query_, raw_key_;  // fp32, before the norms of q and k
  cuda::DeviceBuffer partial_sums_, partial_stats_;
  cuda::DeviceBuffer logits_;        // [kLogitRows, vocab]
  cuda::DeviceBuffer best_;          // [max_tokens]
  cuda::DeviceBuffer state_memory_;  // [state_layers, max_state_rows, hidden]
  cuda::PinnedBuffer host_logits_, host_best_, host_states_;
  std::vector<cuda::DeviceBuffer> k_, v_;                 // per layer
  std::map<std::pair<int, Choice>, cuda::Graph> graphs_;  // of numbers of tokens
  std::span<TokenId> tokens_;
  std::span<const float> states_;
};

}  // namespace deinfer

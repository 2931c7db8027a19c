// A step's inputs as the CUDA decoder's kernels read them: one block of memory, uploaded at once,
// with everything at fixed places, so that captured graphs find it. Host logic only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/sampling.h"
#include "ops/batch.h"

namespace deinfer {

/// Rows that activations of so many tokens have.
constexpr int padded_tokens(int tokens) {
  return cuda::tiles_of(tokens, cuda::kTokenPadding) * cuda::kTokenPadding;
}

/// The smallest of the sizes for which decode steps have graphs that holds m >= 1 tokens: 1, 2, 4,
/// 8, then multiples of 8 up to 64 and of 32 up to 256; 0 beyond.
int graph_bucket(int m);
/// Those, ascending, up to the first that holds `most` >= 1 tokens, if any does.
std::vector<int> graph_sizes(int most);

/// Attention that layers have in common: its window (0: none), and the kv heads that tasks are for.
struct CudaAttentionKind {
  int window = 0;
  int kv_heads = 0;
  bool operator==(const CudaAttentionKind&) const = default;
};

struct CudaStepLimits {
  int max_tokens = 0;     // of a batch
  int max_sequences = 0;  // likewise
  int max_model_len = 0;
  int block_size = 16;
  int heads = 0;
  std::vector<CudaAttentionKind> attention;
  int partial_rows = 0;    // room for states of splits
  int parallel_warps = 0;  // that attention should have work for
  int vocabulary = 0;
  int history_tokens = 0;  // that penalties of a step may need
};

/// Lays out a batch. Offsets are in 32-bit words from the block's beginning.
class CudaStep {
 public:
  /// Of one kind of attention.
  struct AttentionOffsets {
    std::int64_t num_tasks, num_combines, tasks, combines;
  };
  struct Offsets {
    std::int64_t tokens, positions, slots, argmax_rows, logit_rows, state_rows, sequences;
    std::int64_t sampled_rows, samples;  // samples: cuda::SampleRow
    std::vector<AttentionOffsets> attention;
    std::int64_t tables;  // of blocks, and behind those in use the history of sampled rows
    std::int64_t end;
  };

  explicit CudaStep(const CudaStepLimits& limits);

  const Offsets& offsets() const { return offsets_; }
  int partial_rows() const { return limits_.partial_rows; }
  const CudaAttentionKind& attention(std::size_t kind) const { return limits_.attention[kind]; }
  std::size_t capacity_bytes() const { return static_cast<std::size_t>(offsets_.end) * 4; }

  /// Writes `batch`, filled up to `tokens` tokens that have no slot, into `block`
  /// (capacity_bytes()), and returns how many bytes of it are used. Tokens' rows of KV must be
  /// covered by their block tables.
  std::size_t build(const Batch& batch, int tokens, std::byte* block) const;

  /// Rows that are sampled: the batch's, and with them those of which the most likely token is
  /// wanted, so that one product serves all.
  static int num_sampled(const Batch& batch);

 private:
  /// Describes the sampled rows; their histories begin at word `pool` and end where it returns.
  std::int64_t lay_out_samples(const Batch& batch, int tokens, std::int64_t pool,
                               std::int32_t* words) const;
  void plan_attention(const Batch& batch, const CudaAttentionKind& kind, const AttentionOffsets& at,
                      std::int32_t* words) const;

  CudaStepLimits limits_;
  Offsets offsets_;
};

}  // namespace deinfer

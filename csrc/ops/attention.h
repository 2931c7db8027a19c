// Causal attention of a batch over paged KV, or over the latents that it was made of. Where ranks
// divide the tokens, each attends to its own for all heads; a rank receives what all found for its
// heads and merges it in the order of the ranks, weighted by the sums of exponentials.
#pragma once

#include <vector>

#include "ops/batch.h"
#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/latent_kv.h"

namespace deinfer {

struct AttentionShape {
  int heads = 0;
  int kv_heads = 0;  // divides heads; the heads of a group share K and V
  int head_dim = 0;
  int window = 0;  // positions a token sees, itself included; 0 means all
  float scale = 1.0f;
  float soft_cap = 0.0f;  // of scores (QueryView); 0: none
  KvForms forms;          // of the layers that it serves
  int k_latent = 0;       // the largest rank of their absorbed keys
  int v_latent = 0;       // and values
  cpu::TokenShare share;  // whose tokens' KV is here
  Range out_heads;        // whose outputs are wanted, where ranks divide the tokens

  int group() const { return heads / kv_heads; }
  HeadCounts counts() const { return {heads, kv_heads, head_dim}; }
  bool absorbs_k() const { return forms.k == KvForm::kAbsorbed; }
  bool absorbs_v() const { return forms.v == KvForm::kAbsorbed; }
  bool rebuilds() const { return forms.k == KvForm::kRebuilt || forms.v == KvForm::kRebuilt; }
  int k_width() const { return absorbs_k() ? k_latent : head_dim; }
  int v_width() const { return absorbs_v() ? v_latent : head_dim; }
  bool token_sharded() const { return share.size > 1; }
  bool operator==(const AttentionShape&) const = default;
};

/// The division of one batch's attention into units of work, the same in every layer that it
/// serves. How units are cut changes no bit of the result (kernel_table.h).
class AttentionSchedule {
 public:
  /// `activations` is the type of what run() writes.
  AttentionSchedule(const AttentionShape& shape, DType activations, int num_threads);

  /// Plans `batch`; call it on one thread before the layers run. What ranks exchange goes in parts
  /// of kAttentionTokens rows of each `tile_tokens` (Overlap).
  void plan(const Batch& batch, int tile_tokens = kTileTokens);

  /// out[m, heads * head_dim] = attention(q[m, heads, head_dim]) in the activation type; of
  /// out_heads where ranks divide the tokens.
  void run(ExecutionContext& ctx, const Batch& batch, const float* q, std::ptrdiff_t ldq,
           const KvLayer& kv, const LatentKv& latents, const Activations& out);

 private:
  static constexpr int kWhole = -1;

  struct Unit {
    int sequence = 0;
    int head = 0;   // first query head
    int heads = 0;  // of whole groups
    int token = 0;  // first query token, within the sequence
    int tokens = 0;
    int first_split = 0;
    int num_splits = 0;
    int partial = kWhole;  // first partial state, or kWhole when one thread does all splits
    std::int64_t cost = 0;

    int rows() const { return tokens * heads; }
  };

  /// One (unit, split) or a whole unit.
  struct Task {
    int unit = 0;
    int split = kWhole;
    std::int64_t cost_before = 0;  // of the pass
  };

  /// Rows of the batch that are done together.
  struct Pass {
    Range rows, units, tasks;
    std::int64_t cost = 0;
    bool divides = false;  // some units among threads
  };

  /// What run() was given.
  struct Call {
    const Batch& batch;
    const float* q;
    std::ptrdiff_t ldq;
    const KvLayer& kv;
    const LatentKv& latents;
    Activations out;
    int k_dim, v_dim;          // of the layer's K and V as attention sees them
    int first_row = 0;         // of the pass
    float* partial = nullptr;  // this rank's contribution, where ranks divide the tokens
  };

  int tokens_of_unit(int rows) const;
  int heads_of_unit(int tokens) const;
  Range seen(const BatchSequence& sequence, const Unit& unit) const;
  void plan_rows(const Batch& batch, Range rows);
  void plan_tasks(Pass& pass);
  cpu::AttentionState state_at(float* memory) const;
  cpu::KvView view_of(ExecutionContext& ctx, const Unit& unit, int split, const Call& call) const;
  void absorb_queries(ExecutionContext& ctx, const Pass& pass, const Call& call);
  void run_task(ExecutionContext& ctx, const Task& task, const Call& call);
  void merge_partials(ExecutionContext& ctx, const Pass& pass, const Call& call);
  void finish(ExecutionContext& ctx, const Unit& unit, const cpu::AttentionState& state,
              const Call& call);
  void contribute(const Unit& unit, int row, const cpu::AttentionState& state, const Call& call);
  void scale_contribution(ExecutionContext& ctx, const Pass& pass, const Call& call);
  void merge_ranks(ExecutionContext& ctx, const Pass& pass, const Call& call);
  int partial_columns() const;
  Activations latent_outputs(const Call& call);

  AttentionShape shape_;
  DType activations_;
  int num_threads_;
  std::size_t state_floats_;
  std::vector<Pass> passes_;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
  int partial_capacity_;
  Buffer partials_;
  ActivationBuffer rounded_queries_;  // [rows of a pass, heads * head_dim], for absorbed keys
  Buffer absorbed_queries_;           // [rows of a pass, heads, r]
  ActivationBuffer latent_outputs_;   // [rows of a pass, heads, r padded to 2]
};

/// Bytes of ThreadScratch::attention that `shape` needs.
std::size_t attention_scratch_bytes(const cpu::KernelTable& kernels, const AttentionShape& shape,
                                    DType cache);

}  // namespace deinfer

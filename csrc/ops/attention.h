// Causal attention of a batch over paged KV.
#pragma once

#include <vector>

#include "ops/batch.h"
#include "ops/context.h"
#include "ops/kv_cache.h"

namespace deinfer {

struct AttentionShape {
  int heads = 0;
  int kv_heads = 0;  // divides heads; the heads of a group share K and V
  int head_dim = 0;
  int window = 0;  // positions a token sees, itself included; 0 means all
  float scale = 1.0f;
  float soft_cap = 0.0f;  // of scores (QueryView); 0: none

  int group() const { return heads / kv_heads; }
  bool operator==(const AttentionShape&) const = default;
};

/// The division of one batch's attention into units of work, the same in every layer. Whether a
/// unit covers all KV positions or one split changes no bit of the result (kernel_table.h).
class AttentionSchedule {
 public:
  AttentionSchedule(const AttentionShape& shape, int num_threads);

  /// Plans `batch`; call it on one thread before the layers run.
  void plan(const Batch& batch);

  /// out[m, heads * head_dim] = attention(q[m, heads, head_dim]) in the activation type.
  void run(ExecutionContext& ctx, const Batch& batch, const float* q, std::ptrdiff_t ldq,
           const KvLayer& kv, const Activations& out);

 private:
  static constexpr int kWhole = -1;

  struct Unit {
    int sequence = 0;
    int kv_head = 0;
    int token = 0;  // first query token, within the sequence
    int tokens = 0;
    int first_split = 0;
    int num_splits = 0;
    int partial = kWhole;  // first partial state, or kWhole when one thread does all splits
    std::int64_t cost = 0;
  };

  /// One (unit, split) or a whole unit.
  struct Task {
    int unit = 0;
    int split = kWhole;
    std::int64_t cost_before = 0;
  };

  int rows_of(const Unit& unit) const { return unit.tokens * shape_.group(); }
  cpu::AttentionState state_at(float* memory) const;
  void run_task(ExecutionContext& ctx, const Task& task, const Batch& batch, const float* q,
                std::ptrdiff_t ldq, const KvLayer& kv, const Activations& out);
  void finish(ExecutionContext& ctx, const Unit& unit, const Batch& batch,
              const cpu::AttentionState& state, const Activations& out) const;

  AttentionShape shape_;
  int num_threads_;
  int tokens_per_unit_;
  std::size_t state_floats_;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
  std::int64_t total_cost_ = 0;
  int num_partials_ = 0;
  int partial_capacity_;
  Buffer partials_;
};

/// Bytes of ThreadScratch::attention that `shape` needs.
std::size_t attention_scratch_bytes(const cpu::KernelTable& kernels, const AttentionShape& shape);

}  // namespace deinfer

// Which exchanges a plan makes, from the placements of its linears: the executor makes exactly
// these, and the cost model prices them. Under size 1 they are listed all the same; nothing
// travels.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "plan/kv_forms.h"
#include "plan/norms.h"
#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// The linears of one layer. A plain MLP has no gate: n is 0.
struct LayerShape {
  LinearShape query, key, value, attention_output, gate, up, down;
  KvForms kv = {};  // what the KV cache keeps
};

/// The collective that makes an exchange, which must not be kNone.
Collective collective_of(Exchange exchange);

/// Floats per token of what a rank finds in its tokens: of every head an output, its maximum and
/// its sum.
int attention_part_columns(const ModelShape& model);

/// Where in a layer or step an exchange stands.
enum class ExchangeStage {
  kBefore,  // of x, ahead of the products
  kAfterV,
  kAfterU,
  kStatistics,  // of a norm after U, alone
  kAttention,   // of what ranks find in their tokens
  kEnd,         // of the model: embedding, final norm, logits
};

struct PlannedExchange {
  Collective kind;
  std::string_view where;  // "qkv", "attention_output", "gate_up", "down", the linear ("query",
                           // ...) under naive, "qk_norm", "attention", or "embedding",
                           // "final_norm", "logits", "most_likely"
  ExchangeStage stage;
  std::uint64_t bytes;  // contributed by the rank
  bool operator==(const PlannedExchange&) const = default;
};

/// Linears with a common input that share their exchanges.
struct LinearGroup {
  std::string_view where;
  bool adds_to_residual = false;
  std::vector<std::pair<LinearRole, LinearShape>> linears;
  bool all_heads = false;  // as place_linear(); attention over token-sharded KV follows
};

/// In the order of execution: qkv, attention output, gate and up, down; one linear each under a
/// plan that does not merge.
std::vector<LinearGroup> layer_groups(const TensorParallelPlan& plan, const LayerShape& layer);

/// The exchanges of one group over m tokens. Sums travel in fp32, as many columns as are summed (to
/// which hidden shards add the statistics of the norm of what is read: 1 column for RMSNorm, 2 for
/// LayerNorm); gathered z and normed rows travel in the activation type, the gathered residual
/// columns in fp32. Statistics of norms after U, of rows that ranks have parts of, travel alone: 1
/// column under hidden shards for the RMSNorm of what a block adds, 2 for q and k over all heads.
/// Attention over token-sharded KV follows the projections: for each token and head an output, its
/// maximum and its sum, in fp32, of which a rank receives those of its heads; kAttentionTokens
/// tokens at a time.
/// `activation_bytes`: 2 or 4. Sums of z go in up to `chunks` chunks (plan/overlap.h), the
/// statistics with the first.
std::vector<PlannedExchange> group_exchanges(const TensorParallelPlan& plan,
                                             const LinearGroup& group, int m, int rank,
                                             int activation_bytes, const LayerNorms& norms,
                                             int chunks = 1);

/// Those of one layer, in order.
std::vector<PlannedExchange> layer_exchanges(const TensorParallelPlan& plan,
                                             const LayerShape& layer, int m, int rank,
                                             int activation_bytes, const LayerNorms& norms,
                                             int chunks = 1);

/// One pass over the model.
struct StepRows {
  int tokens = 0;
  int logit_rows = 0;   // rows whose logits are wanted
  int argmax_rows = 0;  // rows of which only the most likely token is wanted
};

/// What the embedding exchanges, ahead of the layers.
std::vector<PlannedExchange> embedding_exchanges(const TensorParallelPlan& plan, int tokens);
/// What the final norm and the head exchange, after the layers: rows whose logits are wanted by
/// themselves, then the others.
std::vector<PlannedExchange> head_exchanges(const TensorParallelPlan& plan, const StepRows& rows,
                                            int rank);

/// All of one pass, in order: embedding, layers, head. Tokens that pass through the ranks in
/// several tiles make the exchanges of the embedding and the layers for each of them, and so do
/// those of the head for wanted rows that no single exchange holds.
std::vector<PlannedExchange> step_exchanges(const TensorParallelPlan& plan,
                                            const std::vector<LayerShape>& layers,
                                            const StepRows& rows, int rank, int activation_bytes,
                                            const LayerNorms& norms, int chunks = 1);

}  // namespace deinfer

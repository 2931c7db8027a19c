// What the KV cache takes, and attention over it: the part of the cost model (plan/cost_model.h)
// that depends on what is kept of K and V.
#include <algorithm>

#include "plan/cost_model.h"

namespace deinfer {
namespace {

// Rows of a unit of attention.
constexpr double kRebuildTokens = 64;

}  // namespace

KvLayerShape rank_kv_shape(const PlannedModel& model, const TensorParallelPlan& plan,
                           const LayerShape& layer, int rank) {
  const int kv_heads = attention_heads(plan, rank, layer.kv.token_sharded).kv_heads.size();
  const KvTraits traits = model.kv_traits();
  return {kv_key_shape(traits, layer.kv.k, layer.key.rank, kv_heads, model.activation_bytes),
          kv_value_shape(traits, layer.kv.v, layer.value.rank, kv_heads),
          layer.kv.token_sharded ? plan.size() : 1};
}

double attention_seconds(const PlannedModel& model, const TensorParallelPlan& plan,
                         const Hardware& hardware, const Phase& phase, const LayerShape& layer) {
  const KvTraits traits = model.kv_traits();
  const double rebuild_flops_per_s =
      hardware.rebuild_flops_per_s > 0 ? hardware.rebuild_flops_per_s : hardware.flops_per_s;
  double slowest = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const KvLayerShape shape = rank_kv_shape(model, plan, layer, rank);
    const double tokens = phase.tokens;
    // A prefill chunk is one sequence, whose tokens see half of the chunk on average.
    const double seen =
        (phase.prefill ? tokens * (phase.context + tokens / 2) : tokens * phase.context) /
        shape.ranks;
    const double read = phase.prefill ? phase.context + tokens : tokens * phase.context;
    // Tokens of a prompt share what is rebuilt, as many as a unit of attention has rows for.
    const double sharing = phase.prefill ? std::min(tokens, kRebuildTokens / traits.group) : 1;
    const double bytes = read * model.activation_bytes * shape.elements();
    const HeadShare share = attention_heads(plan, rank, layer.kv.token_sharded);
    const int heads = share.heads.size();
    const int kv_heads = share.kv_heads.size();
    const double flops = seen * (kv_attention_flops(traits, layer.kv.k, layer.key.rank, heads) +
                                 kv_attention_flops(traits, layer.kv.v, layer.value.rank, heads));
    const double rebuild = seen / sharing *
                           (kv_rebuild_flops(traits, layer.kv.k, layer.key.rank, kv_heads) +
                            kv_rebuild_flops(traits, layer.kv.v, layer.value.rank, kv_heads));
    slowest = std::max({slowest, bytes / hardware.attention_bytes_per_s,
                        flops / hardware.attention_flops_per_s + rebuild / rebuild_flops_per_s});
  }
  return slowest;
}

std::uint64_t rank_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan, int rank) {
  std::uint64_t whole = 0, divided = 0;  // elements
  for (const LayerShape& layer : model.layers) {
    const KvLayerShape shape = rank_kv_shape(model, plan, layer, rank);
    (shape.ranks > 1 ? divided : whole) += shape.k.elements() + shape.v.elements();
  }
  const auto bytes = static_cast<std::uint64_t>(model.activation_bytes);
  const auto ranks = static_cast<std::uint64_t>(plan.size());
  return whole * bytes + (divided * bytes + ranks - 1) / ranks;
}

std::uint64_t most_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan) {
  std::uint64_t most = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    most = std::max(most, rank_kv_bytes(model, plan, rank));
  }
  return most;
}

}  // namespace deinfer

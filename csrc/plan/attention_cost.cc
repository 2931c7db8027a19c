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
                           const LayerShape& layer, const KvForms& forms, int rank) {
  const int kv_heads = plan.heads(rank).kv_heads.size();
  return {
      kv_key_shape(model.kv_traits(), forms.k, layer.key.rank, kv_heads, model.activation_bytes),
      kv_value_shape(model.kv_traits(), forms.v, layer.value.rank, kv_heads)};
}

double attention_seconds(const PlannedModel& model, const TensorParallelPlan& plan,
                         const Hardware& hardware, const Phase& phase, const LayerShape& layer,
                         const KvForms& forms) {
  double slowest = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const HeadShare share = plan.heads(rank);
    const double tokens = phase.tokens;
    // A prefill chunk is one sequence, whose tokens see half of the chunk on average.
    const double seen =
        phase.prefill ? tokens * (phase.context + tokens / 2) : tokens * phase.context;
    const double read = phase.prefill ? phase.context + tokens : tokens * phase.context;
    // Tokens of a prompt share what is rebuilt, as many as a unit of attention has rows for.
    const double sharing =
        phase.prefill ? std::min(tokens, kRebuildTokens / model.kv_traits().group) : 1;
    const KvLayerShape shape = rank_kv_shape(model, plan, layer, forms, rank);
    const double bytes = read * model.activation_bytes *
                         static_cast<double>(shape.k.elements() + shape.v.elements());
    const int heads = share.heads.size();
    const int kv_heads = share.kv_heads.size();
    const double flops =
        seen * (kv_attention_flops(model.kv_traits(), forms.k, layer.key.rank, heads) +
                kv_attention_flops(model.kv_traits(), forms.v, layer.value.rank, heads));
    const double rebuild =
        seen / sharing *
        (kv_rebuild_flops(model.kv_traits(), forms.k, layer.key.rank, kv_heads) +
         kv_rebuild_flops(model.kv_traits(), forms.v, layer.value.rank, kv_heads));
    slowest = std::max({slowest, bytes / hardware.attention_bytes_per_s,
                        flops / hardware.attention_flops_per_s + rebuild / hardware.flops_per_s});
  }
  return slowest;
}

std::uint64_t rank_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan, int rank) {
  std::uint64_t elements = 0;
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const KvForms forms = model.kv_forms.empty() ? KvForms{} : model.kv_forms[i];
    const KvLayerShape shape = rank_kv_shape(model, plan, model.layers[i], forms, rank);
    elements += shape.k.elements() + shape.v.elements();
  }
  return elements * static_cast<std::uint64_t>(model.activation_bytes);
}

std::uint64_t most_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan) {
  std::uint64_t most = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    most = std::max(most, rank_kv_bytes(model, plan, rank));
  }
  return most;
}

}  // namespace deinfer

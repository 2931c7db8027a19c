#include "plan/cost_model.h"

#include <algorithm>

#include "base/check.h"
#include "plan/numbers.h"
#include "plan/plans.h"

namespace deinfer {
namespace {

// Operations of a layer besides products and norms: attention, the merge of its parts. Rotation,
// activation and residual addition are epilogues of products.
constexpr int kLayerOperations = 2;
constexpr int kEndOperations = 3;  // embedding, final norm, most likely token

double elements(Range rows, Range cols) {
  return static_cast<double>(rows.size()) * static_cast<double>(cols.size());
}

/// Norms over the hidden dimension in a layer.
int hidden_norms(const LayerNorms& norms) {
  return (norms.input != NormKind::kNone ? 2 : 0) + (norms.output != NormKind::kNone ? 2 : 0);
}

/// What one operation of one rank reads and computes.
struct Work {
  double bytes = 0;
  double flops = 0;
  bool any = false;

  void add(double weights, int weight_bytes, int tokens) {
    any = true;
    if (tokens == 0) return;
    bytes += weights * weight_bytes;
    flops += 2 * weights * tokens;
  }
  double seconds(const Hardware& hardware) const {
    return std::max(bytes / hardware.memory_bytes_per_s, flops / hardware.flops_per_s);
  }
};

/// A group of linears as the slowest rank computes it.
struct GroupCost {
  double v = 0;  // seconds of the product with V
  double u = 0;  // with U or W
  int operations = 0;
  std::vector<PlannedExchange> exchanges;  // with the largest contributions
};

GroupCost group_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                     const LinearGroup& group, const Hardware& hardware, int m) {
  GroupCost cost;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const bool token_shards = plan.residual() == ResidualLayout::kTokenShards;
    const int own = token_shards ? split(m, plan.size(), rank).size() : m;
    Work v, u, w;
    bool after_u = false;
    for (const auto& [role, shape] : group.linears) {
      const LinearPlacement place = plan.place(role, shape, rank);
      const double u_elements = elements(place.u_rows, place.u_cols);
      after_u |= place.after_u != Exchange::kNone;
      if (shape.rank == 0 || plan.multiplies_out()) {
        w.add(u_elements, model.weight_bytes, m);
        continue;
      }
      // Between z and the residual stream a rank computes its own tokens only.
      v.add(elements(place.v_rows, place.v_cols), model.weight_bytes,
            group.adds_to_residual ? m : own);
      u.add(u_elements, model.weight_bytes, group.adds_to_residual ? own : m);
    }
    cost.v = std::max(cost.v, v.seconds(hardware));
    cost.u = std::max(cost.u, u.seconds(hardware) + w.seconds(hardware));
    // Epilogues wait for the sum where U's output is exchanged.
    cost.operations = int{v.any} + int{u.any} + int{w.any} + int{after_u};
    auto exchanges = group_exchanges(plan, group, m, rank, model.activation_bytes, model.norms);
    if (rank == 0) cost.exchanges = exchanges;
    for (std::size_t i = 0; i < exchanges.size(); ++i) {
      cost.exchanges[i].bytes = std::max(cost.exchanges[i].bytes, exchanges[i].bytes);
    }
  }
  return cost;
}

/// Seconds that an exchange adds to `producer` and `consumer`, the seconds of the products before
/// and after it, when all three are cut in `chunks`. One resource computes, one transfers.
double exposed_seconds(double producer, double consumer, double chunk_exchange, int chunks,
                       double operation) {
  double computed = 0;
  double transferred = 0;
  std::vector<double> arrived;
  for (int i = 0; i < chunks; ++i) {
    computed += producer / chunks + (i > 0 && producer > 0 ? operation : 0);
    transferred = std::max(transferred, computed) + chunk_exchange;
    arrived.push_back(transferred);
  }
  for (int i = 0; i < chunks; ++i) {
    computed = std::max(computed, arrived[static_cast<std::size_t>(i)]) + consumer / chunks +
               (i > 0 && consumer > 0 ? operation : 0);
  }
  return computed - producer - consumer;
}

double exposed_exchanges(const GroupCost& group, const Hardware& hardware, const LinkModel& link,
                         int ranks, int chunks) {
  double exposed = 0;
  if (ranks == 1) return exposed;
  for (const PlannedExchange& exchange : group.exchanges) {
    const auto parts = static_cast<std::uint64_t>(chunks);
    const double seconds =
        exchange_seconds(link, exchange.kind, (exchange.bytes + parts - 1) / parts, ranks);
    double producer = 0, consumer = 0;
    switch (exchange.stage) {
      case ExchangeStage::kBefore: consumer = group.u; break;
      case ExchangeStage::kAfterV: producer = group.v, consumer = group.u; break;
      case ExchangeStage::kAfterU: producer = group.u; break;
      case ExchangeStage::kEnd: break;
    }
    exposed += exposed_seconds(producer, consumer, seconds, chunks, hardware.operation_s);
  }
  return exposed;
}

double attention_seconds(const PlannedModel& model, const TensorParallelPlan& plan,
                         const Hardware& hardware, const Phase& phase) {
  double slowest = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const HeadShare share = plan.heads(rank);
    const double tokens = phase.tokens;
    // A prefill chunk is one sequence, whose tokens see half of the chunk on average.
    const double seen =
        phase.prefill ? tokens * (phase.context + tokens / 2) : tokens * phase.context;
    const double read = phase.prefill ? phase.context + tokens : tokens * phase.context;
    const double bytes =
        2 * read * share.kv_heads.size() * model.shape.head_dim * model.activation_bytes;
    const double flops = 4 * seen * share.heads.size() * model.shape.head_dim;
    slowest = std::max(
        {slowest, bytes / hardware.attention_bytes_per_s, flops / hardware.attention_flops_per_s});
  }
  return slowest;
}

}  // namespace

Hardware parse_hardware(std::string_view text) {
  // Streaming reads, products of 8192^3 less a margin for smaller ones, FlashAttention; 2.2 us is a
  // graph node's gap of 1.3 us and the ramp and tail of a kernel of some MB.
  if (text == "h100") {
    return {"h100", 3.0e12, 620e12, 0.85 * 3.0e12, 450e12, 2.2e-6, 80'000'000'000};
  }
  constexpr const char* kExpected = "h100 or cpu:GB_per_s:GFLOP_per_s such as cpu:40:500";
  const std::string_view prefix = "cpu:";
  const bool is_cpu = text.starts_with(prefix);
  const auto [gigabytes, gigaflops] =
      parse_two_numbers("hardware", text, is_cpu ? text.substr(prefix.size()) : "", kExpected);
  // A barrier of a thread team takes about a microsecond.
  return {"cpu", gigabytes * 1e9, gigaflops * 1e9, gigabytes * 1e9, gigaflops * 1e9, 1e-6, 0};
}

StepCost step_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                   const Hardware& hardware, const LinkModel& link, const Phase& phase,
                   int chunks) {
  StepCost cost;
  cost.chunks = chunks;
  const double attention = attention_seconds(model, plan, hardware, phase);
  int operations = kEndOperations;
  for (const LayerShape& layer : model.layers) {
    for (const LinearGroup& group : layer_groups(plan, layer)) {
      const GroupCost part = group_cost(model, plan, group, hardware, phase.tokens);
      cost.products += part.v + part.u;
      operations += part.operations;
      cost.exchanges += exposed_exchanges(part, hardware, link, plan.size(), chunks);
    }
    cost.attention += attention;
    operations += kLayerOperations + hidden_norms(model.norms);
    if (model.norms.qk != QkNormKind::kNone) ++operations;
  }

  const int rows = phase.prefill ? 1 : phase.tokens;
  double head = 0;
  std::vector<double> ends;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const LinearPlacement place = plan.place(LinearRole::kHead, model.head, rank);
    Work v, u;
    v.add(elements(place.v_rows, place.v_cols), model.weight_bytes, rows);
    u.add(elements(place.u_rows, place.u_cols), model.weight_bytes, rows);
    head = std::max(head, v.seconds(hardware) + u.seconds(hardware));
    std::vector<PlannedExchange> exchanges = embedding_exchanges(plan, phase.tokens);
    for (const PlannedExchange& exchange : head_exchanges(plan, {phase.tokens, 0, rows}, rank)) {
      exchanges.push_back(exchange);
    }
    ends.resize(exchanges.size());
    for (std::size_t i = 0; i < exchanges.size(); ++i) {
      ends[i] = std::max(
          ends[i], exchange_seconds(link, exchanges[i].kind, exchanges[i].bytes, plan.size()));
    }
  }
  cost.products += head;
  operations += model.head.rank > 0 && !plan.multiplies_out() ? 2 : 1;
  for (double seconds : ends) cost.exchanges += seconds;
  cost.operations = operations * hardware.operation_s;
  return cost;
}

StepCost best_step_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                        const Hardware& hardware, const LinkModel& link, const Phase& phase,
                        int max_chunks) {
  StepCost best = step_cost(model, plan, hardware, link, phase, 1);
  if (plan.size() == 1) return best;
  for (int chunks = 2; chunks <= max_chunks; chunks *= 2) {
    StepCost cost = step_cost(model, plan, hardware, link, phase, chunks);
    if (cost.total() < best.total()) best = cost;
  }
  return best;
}

std::uint64_t rank_weight_bytes(const PlannedModel& model, const TensorParallelPlan& plan,
                                int rank) {
  double weights = 0;
  auto add = [&](LinearRole role, const LinearShape& shape) {
    const LinearPlacement place = plan.place(role, shape, rank);
    weights += elements(place.v_rows, place.v_cols) + elements(place.u_rows, place.u_cols);
  };
  for (const LayerShape& layer : model.layers) {
    for (const LinearGroup& group : layer_groups(plan, layer)) {
      for (const auto& [role, shape] : group.linears) add(role, shape);
    }
  }
  add(LinearRole::kHead, model.head);
  double bytes = weights * model.weight_bytes;
  if (!model.tied_embeddings) {
    bytes += static_cast<double>(plan.vocab_share(rank).size()) * model.shape.hidden_size *
             model.activation_bytes;
  }
  const bool shards = plan.residual() == ResidualLayout::kHiddenShards;
  const int columns = shards ? plan.hidden_share(rank).size() : model.shape.hidden_size;
  bytes += static_cast<double>(model.positions) * columns * model.activation_bytes;
  const double norms = static_cast<double>(model.layers.size()) * hidden_norms(model.norms) + 1;
  const bool biases = model.norms.input == NormKind::kLayer;
  bytes += norms * model.shape.hidden_size * sizeof(float) * (biases ? 2 : 1);
  return static_cast<std::uint64_t>(bytes);
}

std::uint64_t rank_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan, int rank) {
  return 2 * model.layers.size() * static_cast<std::uint64_t>(plan.heads(rank).kv_heads.size()) *
         static_cast<std::uint64_t>(model.shape.head_dim) *
         static_cast<std::uint64_t>(model.activation_bytes);
}

double wire_bytes_per_token(const PlannedModel& model, const TensorParallelPlan& plan) {
  const int size = plan.size();
  const double others = size - 1;
  double sent = 0;
  // With one token for each rank, shares of tokens are whole.
  for (int rank = 0; rank < size; ++rank) {
    for (const PlannedExchange& exchange : step_exchanges(plan, model.layers, {size, 0, size}, rank,
                                                          model.activation_bytes, model.norms)) {
      const auto bytes = static_cast<double>(exchange.bytes);
      switch (exchange.kind) {
        case Collective::kAllReduce: sent += 2 * others / size * bytes; break;
        case Collective::kAllGather: sent += others * bytes; break;
        case Collective::kReduceScatter:
        case Collective::kBroadcast:
        case Collective::kGather: sent += others / size * bytes; break;
        case Collective::kBarrier: break;
      }
    }
  }
  return sent / size / size;
}

}  // namespace deinfer

#include "plan/cost_model.h"

#include <algorithm>

#include "base/check.h"
#include "base/number_pair.h"
#include "plan/overlap.h"
#include "plan/plans.h"

namespace deinfer {
namespace {

// Operations of a layer besides products and norms: attention, the merge of its parts. Rotation,
// activation and residual addition are epilogues of products.
constexpr int kLayerOperations = 2;
constexpr int kEndOperations = 3;  // embedding, final norm, most likely token
// What is fetched in vain where U's stream of weights jumps over the columns of other chunks, per
// output and cut: 8 KiB per panel of 32. Measured on Zen 4: a cut costs 0.2 ms (1 token) to 1 ms
// (128) of a step that takes 2.9 and 31 ms, as this and the sums say.
constexpr double kCutBytes = 256;
// More chunks must promise so much. Before that was asked, 15 of 18 cuts of decode that promised
// less had lost, and 18 of 22 that promised more gained (bench/results/
// tensor_parallel_every_cut.json).
constexpr double kLeastCutGain = 0.03;

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
  double v = 0;          // seconds of the product with V
  double u = 0;          // with U or W
  double cut_bytes = 0;  // that a cut of U adds: sums that are written and read, and kCutBytes
  int operations = 0;
  std::vector<PlannedExchange> exchanges;  // with the largest contributions
};

GroupCost group_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                     const LinearGroup& group, const Hardware& hardware, int m, int chunks = 1) {
  GroupCost cost;
  for (int rank = 0; rank < plan.size(); ++rank) {
    const bool token_shards = plan.residual() == ResidualLayout::kTokenShards;
    const int own = token_shards ? split(m, plan.size(), rank).size() : m;
    Work v, u, w;
    bool after_u = false;
    double outputs = 0;
    for (const auto& [role, shape] : group.linears) {
      const LinearPlacement place = place_linear(plan, role, shape, rank, group.all_heads);
      const double u_elements = elements(place.u_rows, place.u_cols);
      after_u |= place.after_u != Exchange::kNone;
      if (shape.rank == 0 || plan.multiplies_out()) {
        w.add(u_elements, model.weight_bytes, m);
        continue;
      }
      outputs += place.u_rows.size();
      // Between z and the residual stream a rank computes its own tokens only.
      v.add(elements(place.v_rows, place.v_cols), model.weight_bytes,
            group.adds_to_residual ? m : own);
      u.add(u_elements, model.weight_bytes, group.adds_to_residual ? own : m);
    }
    cost.v = std::max(cost.v, v.seconds(hardware));
    cost.u = std::max(cost.u, u.seconds(hardware) + w.seconds(hardware));
    const double sums = 2.0 * sizeof(float) * (group.adds_to_residual ? own : m);
    cost.cut_bytes = std::max(cost.cut_bytes, outputs * (sums + kCutBytes));
    // Epilogues wait for the sum where U's output is exchanged.
    cost.operations = int{v.any} + int{u.any} + int{w.any} + int{after_u};
    auto exchanges =
        group_exchanges(plan, group, m, rank, model.activation_bytes, model.norms, chunks);
    if (rank == 0) cost.exchanges = exchanges;
    for (std::size_t i = 0; i < exchanges.size(); ++i) {
      cost.exchanges[i].bytes = std::max(cost.exchanges[i].bytes, exchanges[i].bytes);
    }
  }
  return cost;
}

/// Computing that the exchange of contributions of `bytes` bytes takes of a rank.
double received_seconds(const Hardware& hardware, Collective kind, std::uint64_t bytes, int ranks) {
  if (ranks == 1) return 0;
  double seconds = hardware.exchange_s;
  if (hardware.received_bytes_per_s > 0) {
    const double parts = kind == Collective::kReduceScatter ? 1 : ranks;
    seconds += parts * static_cast<double>(bytes) / hardware.received_bytes_per_s;
  }
  return seconds;
}

/// One resource that computes and one that transfers. Latencies of exchanges overlap, as they do
/// not occupy the link.
class Timeline {
 public:
  Timeline(const Hardware& hardware, const LinkModel& link, int ranks)
      : hardware_(hardware), link_(link), ranks_(ranks) {}

  double now() const { return computed_; }
  void compute(double seconds) { computed_ += seconds; }
  /// Starts an exchange and returns when it arrives.
  double start(const PlannedExchange& exchange) {
    const double begin = std::max(computed_, link_free_);
    link_free_ =
        begin + exchange_seconds({0, link_.bytes_per_s}, exchange.kind, exchange.bytes, ranks_);
    return begin + exchange_seconds(link_, exchange.kind, exchange.bytes, ranks_);
  }
  void receive(const PlannedExchange& exchange, double arrival) {
    computed_ = std::max(computed_, arrival) +
                received_seconds(hardware_, exchange.kind, exchange.bytes, ranks_);
  }

 private:
  const Hardware& hardware_;
  const LinkModel& link_;
  int ranks_;
  double computed_ = 0;
  double link_free_ = 0;
};

/// Seconds from V to U of a group whose tokens pass in one tile: all chunks of V, each of which
/// travels when it is there, then those of U, each on top of sums that it reads and writes. An
/// operation begins with each further chunk.
double chunked_seconds(const GroupCost& group, const Hardware& hardware, Timeline time) {
  std::vector<const PlannedExchange*> chunks;
  for (const PlannedExchange& exchange : group.exchanges) {
    if (exchange.stage == ExchangeStage::kAfterV) chunks.push_back(&exchange);
  }
  const double parts = std::max<double>(1, static_cast<double>(chunks.size()));
  std::vector<double> arrivals;
  for (const PlannedExchange* chunk : chunks) {
    time.compute(group.v / parts + (arrivals.empty() ? 0 : hardware.operation_s));
    arrivals.push_back(time.start(*chunk));
  }
  if (chunks.empty()) time.compute(group.v);
  for (std::size_t i = 0; i < arrivals.size(); ++i) {
    time.receive(*chunks[i], arrivals[i]);
    time.compute(group.u / parts);
    if (i > 0) time.compute(hardware.operation_s + group.cut_bytes / hardware.memory_bytes_per_s);
  }
  if (chunks.empty()) time.compute(group.u);
  for (const PlannedExchange& exchange : group.exchanges) {
    if (exchange.stage != ExchangeStage::kAfterU) continue;
    time.receive(exchange, time.start(exchange));
  }
  return time.now();
}

/// The same for `tiles` tiles of tokens, of which `tile` is the cost: the exchange of one travels
/// while the next is computed up to its own.
double tiled_seconds(const GroupCost& tile, const Hardware& hardware, int tiles, Timeline time) {
  const PlannedExchange* after_v = nullptr;
  std::vector<const PlannedExchange*> after_u;
  for (const PlannedExchange& exchange : tile.exchanges) {
    if (exchange.stage == ExchangeStage::kAfterV) after_v = &exchange;
    if (exchange.stage == ExchangeStage::kAfterU) after_u.push_back(&exchange);
  }
  double under_way = 0;  // when the exchange of the tile before arrives
  auto complete = [&](double arrival) {
    for (const PlannedExchange* exchange : after_u) time.receive(*exchange, arrival);
    if (!after_u.empty() || after_v == nullptr) return;
    time.receive(*after_v, arrival);
    time.compute(tile.u);
  };
  for (int i = 0; i < tiles; ++i) {
    time.compute(tile.v + (i == 0 ? 0 : tile.operations * hardware.operation_s));
    double arrival = time.now();
    if (after_v != nullptr && after_u.empty()) {
      arrival = time.start(*after_v);
    } else {
      time.compute(tile.u);
      for (const PlannedExchange* exchange : after_u) {
        arrival = time.start(*exchange);
      }
    }
    if (i > 0) complete(under_way);
    under_way = arrival;
  }
  complete(under_way);
  return time.now();
}

/// Seconds of exchanges that nothing hides: of x before V, of statistics, of partial attention.
double exposed_seconds(const GroupCost& group, const Hardware& hardware, const LinkModel& link,
                       int ranks) {
  double exposed = 0;
  for (const PlannedExchange& exchange : group.exchanges) {
    if (exchange.stage != ExchangeStage::kBefore && exchange.stage != ExchangeStage::kStatistics &&
        exchange.stage != ExchangeStage::kAttention) {
      continue;
    }
    exposed += exchange_seconds(link, exchange.kind, exchange.bytes, ranks) +
               received_seconds(hardware, exchange.kind, exchange.bytes, ranks);
  }
  return exposed;
}

/// What exchanges add to the products of a group, and what cutting these costs.
double exchange_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                     const LinearGroup& group, const GroupCost& whole, const Hardware& hardware,
                     const LinkModel& link, int tokens, int chunks) {
  if (plan.size() == 1) return 0;
  const Timeline time(hardware, link, plan.size());
  const Overlap overlap =
      overlap_of(tokens, chunks, hardware.tile_tokens > 0 ? hardware.tile_tokens : tokens);
  const int tiles = (tokens + overlap.tile_tokens - 1) / overlap.tile_tokens;
  const GroupCost part =
      group_cost(model, plan, group, hardware, overlap.tile_tokens, overlap.rank_chunks);
  const double seconds = tiles == 1 ? chunked_seconds(part, hardware, time)
                                    : tiled_seconds(part, hardware, tiles, time);
  return seconds + tiles * exposed_seconds(part, hardware, link, plan.size()) - whole.v - whole.u;
}

}  // namespace

Hardware parse_hardware(std::string_view text) {
  // Streaming reads, products of 8192^3 less a margin for smaller ones, FlashAttention; 2.2 us is a
  // graph node's gap of 1.3 us and the ramp and tail of a kernel of some MB.
  if (text == "h100") {
    Hardware hardware{"h100", 3.0e12, 620e12, 0.85 * 3.0e12, 450e12, 2.2e-6};
    hardware.memory_bytes = 80'000'000'000;
    return hardware;
  }
  const std::string_view prefix = "cpu:";
  const auto rates =
      text.starts_with(prefix) ? parse_number_pair(text.substr(prefix.size())) : std::nullopt;
  check_argument(rates && rates->first > 0.0 && rates->second > 0.0, "hardware=\"", text,
                 "\" is not h100 or cpu:GB_per_s:GFLOP_per_s such as cpu:40:500");
  const double gigabytes = *rates->first, gigaflops = *rates->second;
  const double memory = gigabytes * 1e9, products = gigaflops * 1e9;
  Hardware hardware{"cpu", memory, products, memory, products};
  // A barrier of a thread team, or of ranks that are threads, takes about a microsecond.
  hardware.operation_s = hardware.exchange_s = 1e-6;
  hardware.received_bytes_per_s = memory;
  hardware.tile_tokens = kTileTokens;
  return hardware;
}

std::vector<KvForms> PlannedModel::kv_forms() const {
  std::vector<KvForms> forms;
  for (const LayerShape& layer : layers) forms.push_back(layer.kv);
  return forms;
}

void PlannedModel::set_kv_forms(const std::vector<KvForms>& forms) {
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i].kv = forms[i];
}

StepCost step_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                   const Hardware& hardware, const LinkModel& link, const Phase& phase,
                   int chunks) {
  StepCost cost;
  cost.chunks = chunks;
  int operations = kEndOperations;
  for (const LayerShape& layer : model.layers) {
    for (const LinearGroup& group : layer_groups(plan, layer)) {
      const GroupCost part = group_cost(model, plan, group, hardware, phase.tokens);
      cost.products += part.v + part.u;
      operations += part.operations;
      cost.exchanges +=
          exchange_cost(model, plan, group, part, hardware, link, phase.tokens, chunks);
    }
    cost.attention += attention_seconds(model, plan, hardware, phase, layer);
    operations += kLayerOperations + hidden_norms(model.norms);
    if (layer.kv.token_sharded) ++operations;  // the merge of what ranks found
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
          ends[i],
          exchange_seconds(link, exchanges[i].kind, exchanges[i].bytes, plan.size()) +
              received_seconds(hardware, exchanges[i].kind, exchanges[i].bytes, plan.size()));
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
    if (cost.total() < (1 - kLeastCutGain) * best.total()) best = cost;
  }
  return best;
}

std::uint64_t rank_weight_bytes(const PlannedModel& model, const TensorParallelPlan& plan,
                                int rank) {
  double weights = 0;
  auto add = [&](LinearRole role, const LinearShape& shape, bool all_heads) {
    const LinearPlacement place = place_linear(plan, role, shape, rank, all_heads);
    weights += elements(place.v_rows, place.v_cols) + elements(place.u_rows, place.u_cols);
  };
  for (const LayerShape& layer : model.layers) {
    for (const LinearGroup& group : layer_groups(plan, layer)) {
      for (const auto& [role, shape] : group.linears) add(role, shape, group.all_heads);
    }
  }
  add(LinearRole::kHead, model.head, false);
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

std::uint64_t most_weight_bytes(const PlannedModel& model, const TensorParallelPlan& plan) {
  std::uint64_t most = 0;
  for (int rank = 0; rank < plan.size(); ++rank) {
    most = std::max(most, rank_weight_bytes(model, plan, rank));
  }
  return most;
}

double wire_bytes_per_token(const PlannedModel& model, const TensorParallelPlan& plan) {
  const int size = plan.size();
  double sent = 0;
  // With one token for each rank, shares of tokens are whole.
  for (int rank = 0; rank < size; ++rank) {
    for (const PlannedExchange& exchange : step_exchanges(plan, model.layers, {size, 0, size}, rank,
                                                          model.activation_bytes, model.norms)) {
      sent += static_cast<double>(wire_bytes(exchange.kind, exchange.bytes, size));
    }
  }
  return sent / size / size;
}

}  // namespace deinfer

#include "plan/exchanges.h"

#include <algorithm>
#include <numeric>

#include "plan/overlap.h"
#include "plan/plans.h"

namespace deinfer {
namespace {

std::uint64_t count(int rows, int cols) {
  return static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(cols);
}

void append(std::vector<PlannedExchange>& all, const std::vector<PlannedExchange>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

}  // namespace

Collective collective_of(Exchange exchange) {
  switch (exchange) {
    case Exchange::kAllGather: return Collective::kAllGather;
    case Exchange::kReduceScatter: return Collective::kReduceScatter;
    default: return Collective::kAllReduce;
  }
}

int attention_part_columns(const ModelShape& model) {
  return model.num_heads * (model.head_dim + 2);
}

std::vector<LinearGroup> layer_groups(const TensorParallelPlan& plan, const LayerShape& layer) {
  std::vector<LinearGroup> groups = {
      {"qkv",
       false,
       {{LinearRole::kQuery, layer.query},
        {LinearRole::kKey, layer.key},
        {LinearRole::kValue, layer.value}}},
      {"attention_output", true, {{LinearRole::kAttentionOutput, layer.attention_output}}},
      {"gate_up", false, {{LinearRole::kGate, layer.gate}, {LinearRole::kUp, layer.up}}},
      {"down", true, {{LinearRole::kDown, layer.down}}},
  };
  groups[0].all_heads = layer.kv.token_sharded;
  if (layer.gate.n == 0) groups[2].linears.erase(groups[2].linears.begin());
  if (plan.merges_exchanges()) return groups;
  std::vector<LinearGroup> single;
  for (const LinearGroup& group : groups) {
    for (const auto& [role, shape] : group.linears) {
      std::string_view where = group.where;
      switch (role) {
        case LinearRole::kQuery: where = "query"; break;
        case LinearRole::kKey: where = "key"; break;
        case LinearRole::kValue: where = "value"; break;
        case LinearRole::kGate: where = "gate"; break;
        case LinearRole::kUp: where = "up"; break;
        default: break;
      }
      single.push_back({where, group.adds_to_residual, {{role, shape}}});
    }
  }
  return single;
}

std::vector<PlannedExchange> group_exchanges(const TensorParallelPlan& plan,
                                             const LinearGroup& group, int m, int rank,
                                             int activation_bytes, const LayerNorms& norms,
                                             int chunks) {
  const bool token_shards = plan.residual() == ResidualLayout::kTokenShards;
  const bool hidden_shards = plan.residual() == ResidualLayout::kHiddenShards;
  const int own_tokens = split(m, plan.size(), rank).size();
  constexpr int kKinds = 4;
  bool before = false;
  bool has_v[kKinds] = {}, has_u[kKinds] = {};
  std::vector<int> v_cols[kKinds];  // of each linear; by Exchange
  int u_cols[kKinds] = {};
  for (const auto& [role, shape] : group.linears) {
    const LinearPlacement place = plan.place(role, shape, rank);
    before |= place.before != Exchange::kNone;
    has_v[static_cast<int>(place.after_v)] = true;
    v_cols[static_cast<int>(place.after_v)].push_back(place.v_rows.size());
    has_u[static_cast<int>(place.after_u)] = true;
    u_cols[static_cast<int>(place.after_u)] += place.u_rows.size();
  }

  std::vector<PlannedExchange> exchanges;
  auto add = [&](Exchange exchange, ExchangeStage stage, std::uint64_t bytes) {
    exchanges.push_back({collective_of(exchange), group.where, stage, bytes});
  };
  const int hidden = plan.model().hidden_size;
  if (before) {
    add(Exchange::kAllGather, ExchangeStage::kBefore,
        token_shards ? count(own_tokens, hidden) * static_cast<std::uint64_t>(activation_bytes)
                     : count(m, plan.hidden_share(rank).size()) * sizeof(float));
  }
  for (Exchange exchange : {Exchange::kAllReduce, Exchange::kAllGather, Exchange::kReduceScatter}) {
    if (!has_v[static_cast<int>(exchange)]) continue;
    const std::vector<int>& columns = v_cols[static_cast<int>(exchange)];
    if (exchange == Exchange::kAllGather) {
      add(exchange, ExchangeStage::kAfterV,
          count(token_shards ? own_tokens : m, std::accumulate(columns.begin(), columns.end(), 0)) *
              static_cast<std::uint64_t>(activation_bytes));
      continue;
    }
    const int parts = num_rank_chunks(exchange, columns, chunks);
    for (int chunk = 0; chunk < parts; ++chunk) {
      const bool statistics = hidden_shards && !group.adds_to_residual && chunk == 0;
      int cols = statistics ? statistics_columns(norms.input) : 0;
      for (std::size_t i = 0; i < columns.size(); ++i) {
        cols += chunk_columns(columns, i, chunk, parts).size();
      }
      add(exchange, ExchangeStage::kAfterV, count(m, cols) * sizeof(float));
    }
  }
  for (Exchange exchange : {Exchange::kAllReduce, Exchange::kReduceScatter}) {
    if (!has_u[static_cast<int>(exchange)]) continue;
    add(exchange, ExchangeStage::kAfterU,
        count(m, u_cols[static_cast<int>(exchange)]) * sizeof(float));
  }
  if (hidden_shards && group.adds_to_residual && norms.output != NormKind::kNone) {
    add(Exchange::kAllReduce, ExchangeStage::kStatistics,
        count(m, statistics_columns(norms.output)) * sizeof(float));
  }
  const bool has_query = group.linears.front().first == LinearRole::kQuery;
  if (has_query && norms.qk == QkNormKind::kFull && plan.divides_heads() && !group.all_heads) {
    exchanges.push_back({Collective::kAllReduce, "qk_norm", ExchangeStage::kStatistics,
                         count(m, 2) * sizeof(float)});
  }
  for (int first = 0; group.all_heads && first < m; first += kAttentionTokens) {
    exchanges.push_back(
        {Collective::kReduceScatter, "attention", ExchangeStage::kAttention,
         count(std::min(kAttentionTokens, m - first), attention_part_columns(plan.model())) *
             sizeof(float)});
  }
  return exchanges;
}

std::vector<PlannedExchange> layer_exchanges(const TensorParallelPlan& plan,
                                             const LayerShape& layer, int m, int rank,
                                             int activation_bytes, const LayerNorms& norms,
                                             int chunks) {
  std::vector<PlannedExchange> exchanges;
  for (const LinearGroup& group : layer_groups(plan, layer)) {
    append(exchanges, group_exchanges(plan, group, m, rank, activation_bytes, norms, chunks));
  }
  return exchanges;
}

std::vector<PlannedExchange> embedding_exchanges(const TensorParallelPlan& plan, int tokens) {
  // The table is divided by rows, so that every rank has zeros for the other ranks' tokens.
  const bool whole = plan.residual() == ResidualLayout::kReplicated;
  return {{whole ? Collective::kAllReduce : Collective::kReduceScatter, "embedding",
           ExchangeStage::kEnd, count(tokens, plan.model().hidden_size) * sizeof(float)}};
}

std::vector<PlannedExchange> head_exchanges(const TensorParallelPlan& plan, const StepRows& rows,
                                            int rank) {
  std::vector<PlannedExchange> exchanges;
  auto add = [&](Collective kind, std::string_view where, int m, int cols) {
    exchanges.push_back({kind, where, ExchangeStage::kEnd, count(m, cols) * sizeof(float)});
  };
  auto add_norm = [&](int wanted) {
    if (plan.residual() == ResidualLayout::kHiddenShards) {
      add(Collective::kAllGather, "final_norm", wanted, plan.hidden_share(rank).size());
    } else if (plan.residual() == ResidualLayout::kTokenShards) {
      // Ranks have different numbers of the wanted rows, which may be any: a sum over zeros.
      add(Collective::kAllReduce, "final_norm", wanted, plan.model().hidden_size);
    }
  };
  if (rows.logit_rows > 0) {
    add_norm(rows.logit_rows);
    add(Collective::kGather, "logits", rows.logit_rows, plan.vocab_share(rank).size());
  }
  if (rows.argmax_rows > 0) {
    add_norm(rows.argmax_rows);
    add(Collective::kGather, "most_likely", rows.argmax_rows, 2);  // value and token
  }
  return exchanges;
}

std::vector<PlannedExchange> step_exchanges(const TensorParallelPlan& plan,
                                            const std::vector<LayerShape>& layers,
                                            const StepRows& rows, int rank, int activation_bytes,
                                            const LayerNorms& norms, int chunks) {
  std::vector<PlannedExchange> exchanges = embedding_exchanges(plan, rows.tokens);
  for (const LayerShape& layer : layers) {
    append(exchanges,
           layer_exchanges(plan, layer, rows.tokens, rank, activation_bytes, norms, chunks));
  }
  append(exchanges, head_exchanges(plan, rows, rank));
  return exchanges;
}

}  // namespace deinfer

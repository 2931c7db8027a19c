// What every rank really exchanges, against what plan/exchanges.h lists and the planner prices.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "plan/exchanges.h"
#include "plan/kv_choice.h"
#include "plan/overlap.h"
#include "rank_group_fixture.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Kind;

std::vector<Kind> kinds() {
  test::TinyConfig config;
  config.hidden = 64;
  config.intermediate = 144;
  config.heads = 8;
  config.kv_heads = 4;
  config.layers = 3;
  config.low_rank = false;
  std::vector<Kind> all{{"dense", config}};
  config.low_rank = true;
  config.mlp_rank = 90;  // several chunks of a linear
  config.tied = false;
  all.push_back({"mixed", config});
  config.all_low_rank = true;
  all.push_back({"low_rank", config});
  return all;
}

/// A batch, and the chunks in which its exchanges go.
struct Work {
  std::string name;
  test::RankBatch batch;
  int chunks = 1;
};

std::vector<Work> works() {
  std::vector<Work> all;
  all.push_back({"decode_one", test::RankBatch({1}), 4});
  all.push_back({"decode_nine", test::RankBatch(std::vector<int>(9, 1)), 4});
  all.push_back({"prefill_whole", test::RankBatch({5, 8}), 4});
  all.push_back({"prefill_two_chunks", test::RankBatch({33}), 2});
  all.push_back({"prefill_three_chunks", test::RankBatch({100, 28}), 3});
  all.push_back({"prefill_ragged_tiles", test::RankBatch({90, 13, 70}), 5});
  all.push_back({"prefill_without_wanted_rows", test::RankBatch({64}), 4});
  all.back().batch.batch.argmax_rows.clear();
  // More rows than one exchange of logits takes.
  all.push_back({"prompt_logits", test::RankBatch({70, 70}), 3});
  all.back().batch.batch.logit_rows.resize(140);
  std::iota(all.back().batch.batch.logit_rows.begin(), all.back().batch.batch.logit_rows.end(), 0);
  return all;
}

void add(Traffic& traffic, const std::vector<PlannedExchange>& exchanges, int ranks) {
  for (const PlannedExchange& exchange : exchanges) {
    TrafficCounter& counter = traffic[static_cast<std::size_t>(exchange.kind)];
    ++counter.calls;
    counter.bytes += exchange.bytes;
    counter.wire_bytes += wire_bytes(exchange.kind, exchange.bytes, ranks);
  }
}

/// f(rows) for the parts of n rows, `most` each.
template <typename F>
void for_each_part(int n, int most, F f) {
  for (int first = 0; first < n; first += most) f(std::min(most, n - first));
}

/// The exchanges of a step whose tokens pass in tiles, and wanted rows in parts of `head_rows`.
Traffic planned(const TensorParallelPlan& plan, const PlannedModel& model, const Work& work,
                int rank, int head_rows) {
  const Batch& batch = work.batch.batch;
  int tokens = batch.num_tokens();
  const Overlap overlap = overlap_of(tokens, work.chunks);
  Traffic traffic{};
  for_each_part(tokens, overlap.tile_tokens, [&](int rows) {
    add(traffic,
        step_exchanges(plan, model.layers, {rows, 0, 0}, rank, model.activation_bytes, model.norms,
                       overlap.rank_chunks),
        plan.size());
  });
  for_each_part(static_cast<int>(batch.logit_rows.size()), head_rows, [&](int rows) {
    add(traffic, head_exchanges(plan, {tokens, rows, 0}, rank), plan.size());
  });
  for_each_part(static_cast<int>(batch.argmax_rows.size()), head_rows, [&](int rows) {
    add(traffic, head_exchanges(plan, {tokens, 0, rows}, rank), plan.size());
  });
  return traffic;
}

EngineConfig config_for(const test::TinyModel& model, const std::string& plan, int ranks,
                        int chunks, const std::string& dtype) {
  EngineConfig config;
  config.model = model.path();
  config.dtype = dtype;
  config.tensor_parallel_plan = plan;
  config.tensor_parallel_size = ranks;
  config.exchange_chunks = chunks;
  config.max_num_batched_tokens = 256;
  return config;
}

class TensorParallelTraffic : public testing::TestWithParam<std::string> {};

TEST_P(TensorParallelTraffic, OfEveryRankIsWhatThePlanLists) {
  std::vector<Work> all_works = works();
  for (const Kind& kind : kinds()) {
    test::TinyModel model(kind.config);
    std::string dtype = kind.name == "mixed" ? "bfloat16" : "float32";
    PlannedModel shapes = planned_model(read_model_config(model.path()), 0.0, dtype);
    for (int size : {2, 3, 4, 8}) {
      for (const Work& work : all_works) {
        auto ranks = test::make_ranks(config_for(model, GetParam(), size, work.chunks, dtype));
        test::execute(*ranks, work.batch.batch);
        for (int rank = 0; rank < size; ++rank) {
          auto& worker = static_cast<CpuWorker&>(ranks->rank(rank));
          Traffic expected =
              planned(*ranks->plans()[0], shapes, work, rank,
                      worker.decoder().logit_rows(worker.communicator().max_bytes()));
          for (std::size_t i = 0; i < kNumCollectives; ++i) {
            SCOPED_TRACE(kind.name + ", " + work.name + ", rank " + std::to_string(rank) + " of " +
                         std::to_string(size) + ", " + collective_name(static_cast<Collective>(i)));
            const TrafficCounter& counted = worker.communicator().traffic()[i];
            EXPECT_EQ(counted.calls, expected[i].calls);
            EXPECT_EQ(counted.bytes, expected[i].bytes);
            EXPECT_EQ(counted.wire_bytes, expected[i].wire_bytes);
          }
        }
      }
    }
  }
}

TEST_P(TensorParallelTraffic, OfTokenShardedLatentsIsWhatThePlanLists) {
  for (const char* family : {"llama", "olmo2", "opt"}) {
    test::TinyConfig tiny = kinds().back().config;
    tiny.family = family;
    tiny.dense_key_layer = 0;
    tiny.dense_value_layer = 0;  // a layer without latents
    test::TinyModel model(tiny);
    PlannedModel shapes = planned_model(read_model_config(model.path()), 0.0, "float32");
    for (int size : {2, 5}) {
      auto plan = make_plan(GetParam(), shapes.shape, size);
      const std::vector<KvForms> forms = latent_kv_forms(shapes, *plan, true);
      if (!forms[1].any_latent()) continue;  // the plan has none
      shapes.set_kv_forms(forms);
      ASSERT_FALSE(forms[0].token_sharded);
      for (const Work& work : {Work{"decode", test::RankBatch({1, 1}, {3, 40}, 16 * size), 4},
                               Work{"prefill", test::RankBatch({90, 13, 70}, {}, 16 * size), 5},
                               Work{"whole", test::RankBatch({100, 60}, {}, 16 * size), 1}}) {
        EngineConfig config = config_for(model, GetParam(), size, work.chunks, "float32");
        config.block_size = 16 * size;
        auto ranks = test::make_ranks(config, make_step_plans(GetParam(), shapes.shape, size), 1,
                                      {}, {}, forms);
        std::vector<Traffic> loading;  // exchanges what LayerNorm needs
        for (int rank = 0; rank < size; ++rank) {
          loading.push_back(ranks->rank(rank).communicator().traffic());
        }
        test::execute(*ranks, work.batch.batch);
        for (int rank = 0; rank < size; ++rank) {
          SCOPED_TRACE(std::string(family) + ", " + work.name + ", rank " + std::to_string(rank) +
                       " of " + std::to_string(size));
          auto& worker = static_cast<CpuWorker&>(ranks->rank(rank));
          Traffic expected =
              planned(*ranks->plans()[0], shapes, work, rank,
                      worker.decoder().logit_rows(worker.communicator().max_bytes()));
          for (std::size_t i = 0; i < kNumCollectives; ++i) {
            const TrafficCounter& before = loading[static_cast<std::size_t>(rank)][i];
            const TrafficCounter& counted = worker.communicator().traffic()[i];
            EXPECT_EQ(counted.calls, before.calls + expected[i].calls);
            EXPECT_EQ(counted.bytes, before.bytes + expected[i].bytes);
            EXPECT_EQ(counted.wire_bytes, before.wire_bytes + expected[i].wire_bytes);
          }
        }
      }
    }
  }
}

/// Exchanges of one layer of a decomposed model, by the table of the design.
struct LayerCalls {
  std::uint64_t all_reduce, all_gather, reduce_scatter;
};

LayerCalls design(const std::string& plan) {
  if (plan == "dense") return {2, 0, 0};
  if (plan == "naive") return {7, 0, 0};
  if (plan == "rank_gather") return {2, 2, 0};
  if (plan == "hidden_sharded") return {4, 0, 0};
  if (plan == "two_collective") return {2, 0, 0};
  if (plan == "token_sharded") return {0, 2, 2};
  return {~0ull, ~0ull, ~0ull};
}

TEST_P(TensorParallelTraffic, PerLayerIsThatOfTheDesign) {
  const Kind kind = kinds().back();
  test::TinyModel model(kind.config);
  auto layers = static_cast<std::uint64_t>(kind.config.layers);
  for (int size : {2, 3, 4, 8}) {
    auto ranks = test::make_ranks(config_for(model, GetParam(), size, 1, "float32"));
    test::RankBatch work(std::vector<int>(3, 1));
    work.batch.argmax_rows.clear();
    work.batch.logit_rows.clear();
    test::execute(*ranks, work.batch);
    LayerCalls calls = design(GetParam());
    bool whole = ranks->plans()[0]->residual() == ResidualLayout::kReplicated;
    for (int rank = 0; rank < size; ++rank) {
      const Traffic& traffic = ranks->rank(rank).communicator().traffic();
      auto counted = [&](Collective kind_of) {
        return traffic[static_cast<std::size_t>(kind_of)].calls;
      };
      // The embedding is one more.
      EXPECT_EQ(counted(Collective::kAllReduce), layers * calls.all_reduce + (whole ? 1 : 0));
      EXPECT_EQ(counted(Collective::kAllGather), layers * calls.all_gather);
      EXPECT_EQ(counted(Collective::kReduceScatter),
                layers * calls.reduce_scatter + (whole ? 0 : 1));
    }
  }
}

std::vector<std::string> all_plans() {
  std::vector<std::string> names;
  for (std::string_view name : plan_names()) names.emplace_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Plans, TensorParallelTraffic, testing::ValuesIn(all_plans()),
                         [](const auto& plan) { return plan.param; });

}  // namespace
}  // namespace deinfer

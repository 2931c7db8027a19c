// Tensor-parallel ranks on one CUDA device: every plan against the CPU engine.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda_fixture.h"
#include "cuda_ranks_fixture.h"
#include "plan/exchanges.h"
#include "rank_group_fixture.h"
#include "setting.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Answer;
using test::config_for;
using test::generate;
using test::greedy;
using test::Kind;
using test::kVocabulary;
using test::ranks_for;
using test::Request;
using test::root_mean_square;
using test::Setting;

class CudaRanks : public test::CudaDeviceTest {};

/// The distance of engines of several ranks from fp32 on the CPU.
class RankComparison {
 public:
  explicit RankComparison(const test::TinyModel& model) {
    EngineConfig config = config_for(model, "cpu");
    config.dtype = "float32";
    exact_.emplace(config, 21);
    config.dtype = "bfloat16";
    for (bool multiplied_out : {false, true}) {
      config.tensor_parallel_plan = multiplied_out ? "dense" : "auto";
      rounding_[multiplied_out] = exact_->distance(config);
    }
  }

  /// Not much farther than the CPU's bf16.
  void check(Engine& engine) {
    exact_->check(engine, 2.0, rounding_[engine.model_info().decode_plan == "dense"]);
  }

 private:
  std::optional<test::Comparison> exact_;
  double rounding_[2] = {};  // of bf16; with the factors multiplied out
};

TEST_F(CudaRanks, EveryPlanComputesTheLogitsOfTheCpuEngine) {
  const std::vector<std::string_view> plans = plan_names();
  const std::vector<Kind> all = test::rank_kinds(6);
  for (std::size_t i = 0; i < all.size(); ++i) {
    test::TinyModel model(all[i].config);
    RankComparison comparison(model);
    for (std::size_t j = i % 2; j < plans.size(); j += 2) {
      // With 4 ranks there are fewer kv heads.
      const int size = 2 + static_cast<int>((i + j / 2) % 3);
      SCOPED_TRACE(all[i].name + ", " + std::to_string(size) + " ranks, " + std::string(plans[j]));
      Engine engine(ranks_for(model, size, plans[j]));
      comparison.check(engine);
    }
  }
}

TEST_F(CudaRanks, SomeRanksHaveNothingOfSomeMatrices) {
  // 8 ranks: 48 columns, 80 inner columns and 97 tokens are fewer than 8 shares; some ranks are 1.
  for (const Kind& kind : test::rank_kinds(8)) {
    if (kind.name != "llama" && kind.name != "opt") continue;
    test::TinyModel model(kind.config);
    RankComparison comparison(model);
    for (std::string_view plan : plan_names()) {
      if (kind.name == "opt" && plan != "hidden_sharded") continue;
      SCOPED_TRACE(kind.name + ", " + std::string(plan));
      Engine engine(ranks_for(model, 8, plan));
      comparison.check(engine);
    }
  }
}

/// Together and by graphs, or in lockstep, in small pieces and after preemptions; sums by all ranks
/// for themselves or by one for all.
TEST_F(CudaRanks, ATokenHasTheSameBitsInEveryWay) {
  test::TinyConfig config = test::rank_kinds(6)[0].config;
  test::TinyModel model(config);
  std::vector<Request> requests;
  for (int i = 0; i < 4; ++i) {
    Request request = greedy(3 + 13 * i % 31, i, 3 + i % 2);
    if (i % 3 == 1) {  // sampled on the host
      request.params.temperature = 0.8f;
      request.params.top_p = 0.9f;
      request.params.logprobs = 2;
    }
    requests.push_back(request);
  }
  for (std::string_view plan : plan_names()) {
    SCOPED_TRACE(plan);
    EngineConfig engine_config = ranks_for(model, 3, plan);
    Engine together(engine_config);
    const std::vector<Answer> all = generate(together, requests);
    {
      Setting two_shot("DEINFER_CUDA_TWO_SHOT", "0");
      Engine engine(engine_config);
      EXPECT_EQ(generate(engine, requests), all) << "two shots";
    }
    Setting lockstep("DEINFER_CUDA_LOCKSTEP", "1");
    engine_config.enable_prefix_caching = false;
    engine_config.max_num_batched_tokens = 24;
    engine_config.num_kv_blocks = 6;
    Engine crowded(engine_config);
    EXPECT_EQ(generate(crowded, requests), all) << "lockstep";
  }
}

/// Logits of one decode step, over and over, by its graph and in lockstep.
TEST_F(CudaRanks, ReplaysHaveTheSameBits) {
  test::TinyModel model(test::rank_kinds(8)[0].config);
  const test::RankBatch work(std::vector<int>(6, 1));
  for (std::string_view plan : plan_names()) {
    SCOPED_TRACE(plan);
    for (int size : test::kRankCounts) {
      std::vector<float> first;
      auto replay = [&](int count) {
        EngineConfig config = ranks_for(model, size, plan);
        config.hidden_state_layers.clear();
        auto ranks = test::make_ranks(config);
        for (int i = 0; i < count; ++i) {
          const std::vector<float> got = test::step_results(*ranks, work.batch);
          if (first.empty()) first = got;
          ASSERT_EQ(got, first) << size << " ranks, step " << i;
        }
      };
      replay(test::kReplays);
      Setting lockstep("DEINFER_CUDA_LOCKSTEP", "1");
      replay(1);
    }
  }
}

TEST_F(CudaRanks, TellHiddenStates) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  Request request = greedy(9, 1, 3);
  request.params.hidden_states = 1;
  auto last_states = [&](const EngineConfig& engine_config) {
    Engine engine(engine_config);
    engine.submit(request.prompt, request.params);
    std::vector<float> last;
    while (engine.has_unfinished_requests()) {
      for (RequestOutput& output : engine.step()) {
        for (SequenceOutput& sample : output.outputs) {
          if (!sample.hidden_states.empty()) last = sample.hidden_states;
        }
      }
    }
    return last;
  };
  const std::vector<float> expected = last_states(config_for(model, "cpu"));
  for (const char* plan : {"rank_gather", "hidden_sharded", "token_sharded"}) {
    const std::vector<float> states = last_states(ranks_for(model, 3, plan));
    ASSERT_EQ(states.size(), expected.size());
    EXPECT_LE(root_mean_square(states, expected), 0.02) << plan;
  }
}

/// What is exchanged is what plan/exchanges.h lists, as on the CPU.
TEST_F(CudaRanks, ExchangeWhatThePlanLists) {
  for (const Kind& kind : {test::rank_kinds(6)[0], test::rank_kinds(6)[3]}) {
    test::TinyModel model(kind.config);
    const PlannedModel shapes = planned_model(read_model_config(model.path()), 0.0, "bfloat16");
    for (std::string_view plan : plan_names()) {
      EngineConfig config = ranks_for(model, 3, plan);
      config.hidden_state_layers.clear();
      auto ranks = test::make_ranks(config);
      Traffic expected[3] = {};
      for (const std::vector<int>& lengths : {std::vector<int>{5, 8, 3}, {1}, {1}}) {
        // The first step of a size, one by its graph; both count.
        test::RankBatch work(lengths);
        test::execute(*ranks, work.batch);
        const StepRows rows{work.batch.num_tokens(), static_cast<int>(work.batch.logit_rows.size()),
                            static_cast<int>(work.batch.argmax_rows.size())};
        for (int rank = 0; rank < 3; ++rank) {
          for (const PlannedExchange& exchange :
               step_exchanges(*ranks->plans()[0], shapes.layers, rows, rank, 2, shapes.norms)) {
            TrafficCounter& counter = expected[rank][static_cast<std::size_t>(exchange.kind)];
            ++counter.calls;
            counter.bytes += exchange.bytes;
          }
        }
      }
      for (int rank = 0; rank < 3; ++rank) {
        for (std::size_t i = 0; i < kNumCollectives; ++i) {
          if (static_cast<Collective>(i) == Collective::kBarrier) continue;
          SCOPED_TRACE(kind.name + ", " + std::string(plan) + ", rank " + std::to_string(rank) +
                       ", " + collective_name(static_cast<Collective>(i)));
          const TrafficCounter& counted = ranks->rank(rank).communicator().traffic()[i];
          EXPECT_EQ(counted.calls, expected[rank][i].calls);
          EXPECT_EQ(counted.bytes, expected[rank][i].bytes);
        }
      }
    }
  }
}

TEST_F(CudaRanks, ShareTheMemoryOfTheirDevice) {
  test::TinyModel model(test::rank_kinds(6)[0].config);
  EngineConfig config = ranks_for(model, 3, "auto");
  config.num_kv_blocks = 0;
  Engine engine(config), whole(config_for(model, "cuda"));
  const ModelInfo& info = engine.model_info();
  EXPECT_EQ(info.tensor_parallel_size, 3);
  EXPECT_EQ(info.rank_weight_bytes.size(), 3u);
  EXPECT_EQ(info.parameters, whole.model_info().parameters);
  EXPECT_EQ(info.num_kv_blocks, 16 * 16) << "what all seats can fill";
}

}  // namespace
}  // namespace deinfer

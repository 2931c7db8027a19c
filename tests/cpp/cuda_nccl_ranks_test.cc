// Tensor-parallel ranks that exchange by NCCL, which is a fake here (cuda_emulation/fake_nccl.cc):
// the bits of those that read each other's memory.
#include <gtest/gtest.h>

#include "cuda_fixture.h"
#include "cuda_ranks_fixture.h"
#include "expect_error.h"
#include "nccl_devices.h"
#include "rank_group_fixture.h"
#include "sanitized.h"
#include "setting.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Answer;
using test::generate;
using test::greedy;
using test::Kind;
using test::kVocabulary;
using test::ranks_for;
using test::Request;
using test::Setting;

class CudaNcclRanks : public test::CudaDeviceTest {
 protected:
  void SetUp() override {
    emulation::device_state().count = 8;
    test::CudaDeviceTest::SetUp();
  }
  void TearDown() override {
    fake_.send_result = 0;
    EXPECT_EQ(fake_.comms, 0) << "destroyed";
    emulation::device_state().count = 1;
    test::CudaDeviceTest::TearDown();
  }

  emulation::FakeNccl& fake_ = test::use_fake_nccl();
};

/// What an engine answers, hidden states included.
struct Answers {
  std::vector<Answer> answers;
  std::vector<float> states;
  bool operator==(const Answers&) const = default;
};

Answers answers_of(const EngineConfig& config) {
  Engine engine(config);
  Request sampled = greedy(5, 2, 2);
  sampled.params.temperature = 0.8f;
  sampled.params.logprobs = 2;
  Request whole = greedy(21, 1, 1);
  whole.params.prompt_logits = true;
  Answers all{generate(engine, {whole, sampled, greedy(12, 3, 2)}), {}};
  Request stated = greedy(9, 1, 2);
  stated.params.hidden_states = 1;
  engine.submit(stated.prompt, stated.params);
  while (engine.has_unfinished_requests()) {
    for (RequestOutput& output : engine.step()) {
      for (const SequenceOutput& sample : output.outputs) {
        all.states.insert(all.states.end(), sample.hidden_states.begin(),
                          sample.hidden_states.end());
      }
    }
  }
  return all;
}

TEST_F(CudaNcclRanks, EveryPlanHasTheBitsOfP2p) {
  const std::vector<std::string_view> plans = plan_names();
  const std::vector<Kind> all = test::rank_kinds(6);
  for (std::size_t i = 0; i < all.size(); i += test::repeats(1, 2)) {
    test::TinyModel model(all[i].config);
    for (std::size_t j = i % 2; j < plans.size(); j += 2) {
      const int size = 2 + static_cast<int>((i + j / 2) % 3);
      SCOPED_TRACE(all[i].name + ", " + std::to_string(size) + " ranks, " + std::string(plans[j]));
      const EngineConfig config = ranks_for(model, size, plans[j]);
      const Answers expected = answers_of(config);
      const std::uint64_t groups = fake_.groups;
      Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
      EXPECT_EQ(answers_of(config), expected);
      EXPECT_GT(fake_.groups, groups);
      if (size == 2 || i > 1) continue;
      Setting two_shot("DEINFER_CUDA_TWO_SHOT", "0");
      EXPECT_EQ(answers_of(config), expected) << "two shots";
    }
  }
}

/// 48 columns, 80 inner columns and 97 tokens are fewer than 8 shares.
TEST_F(CudaNcclRanks, SomeRanksHaveNothingOfSomeMatrices) {
  const std::vector<std::string_view> plans = plan_names();
  test::TinyModel model(test::rank_kinds(8)[0].config);
  for (std::size_t j = 1; j < plans.size(); j += 2) {
    SCOPED_TRACE(plans[j]);
    const EngineConfig config = ranks_for(model, 8, plans[j]);
    const Answers expected = answers_of(config);
    Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
    EXPECT_EQ(answers_of(config), expected);
  }
}

/// A step as it is and by its graph; what is counted, and what travels.
TEST_F(CudaNcclRanks, ReplaysHaveTheSameBitsAndTraffic) {
  test::TinyModel model(test::rank_kinds(8)[0].config);
  const test::RankBatch work(std::vector<int>(6, 1));
  struct Run {
    std::vector<float> first;
    std::vector<Traffic> traffic;
    std::uint64_t moved = 0;
  };
  for (std::string_view plan : plan_names()) {
    for (int size : {2, 3, 4}) {
      if (size != 3 && plan != "hidden_sharded") continue;
      SCOPED_TRACE(std::string(plan) + ", " + std::to_string(size) + " ranks");
      EngineConfig config = ranks_for(model, size, plan);
      config.hidden_state_layers.clear();
      auto run = [&] {
        Run all;
        auto ranks = test::make_ranks(config);
        const std::uint64_t before = fake_.bytes;
        const int launches = emulation::device_state().graph_launches;
        for (int i = 0; i < 3; ++i) {
          const std::vector<float> got = test::step_results(*ranks, work.batch);
          if (i == 0) all.first = got;
          EXPECT_EQ(got, all.first) << "step " << i;
        }
        EXPECT_EQ(emulation::device_state().graph_launches - launches, 2 * size);
        all.moved = fake_.bytes - before;
        for (int rank = 0; rank < size; ++rank) {
          all.traffic.push_back(ranks->rank(rank).communicator().traffic());
        }
        return all;
      };
      const Run p2p = run();
      Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
      const Run nccl = run();
      EXPECT_EQ(nccl.first, p2p.first);
      for (int rank = 0; rank < size; ++rank) {
        for (std::size_t kind = 0; kind < kNumCollectives; ++kind) {
          // P2p ends steps with a barrier where it needs one.
          if (static_cast<Collective>(kind) == Collective::kBarrier) continue;
          const auto index = static_cast<std::size_t>(rank);
          const TrafficCounter& expected = p2p.traffic[index][kind];
          const TrafficCounter& counted = nccl.traffic[index][kind];
          EXPECT_EQ(counted.calls, expected.calls);
          EXPECT_EQ(counted.bytes, expected.bytes);
          EXPECT_EQ(counted.wire_bytes, expected.wire_bytes);
        }
      }
      EXPECT_EQ(p2p.moved, 0u);
      EXPECT_GT(nccl.moved, 0u);
    }
  }
}

TEST_F(CudaNcclRanks, AFailureEndsTheEngine) {
  test::TinyModel model(test::rank_kinds(6)[0].config);
  Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
  const int aborts = fake_.aborts;
  {
    Engine engine(ranks_for(model, 3, "hidden_sharded"));
    generate(engine, {greedy(4, 1, 4)});  // there are graphs
    const Request request = greedy(4, 2, 4);
    engine.submit(request.prompt, request.params);
    fake_.send_result = 1;
    test::expect_error(ErrorCode::kInternal, "NCCL: ncclSend: fake error", [&] { engine.step(); });
    fake_.send_result = 0;
    EXPECT_THROW(engine.step(), Error) << "for good";
  }
  EXPECT_EQ(fake_.aborts - aborts, 3);
}

}  // namespace
}  // namespace deinfer

// What ranks hold of the weights, and what loading them takes, measured.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "comm/local.h"
#include "plan/kv_choice.h"
#include "rank_group_fixture.h"

namespace deinfer {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;

EngineConfig config_for(const test::TinyModel& model, const std::string& plan, int ranks,
                        const std::string& dtype) {
  EngineConfig config;
  config.model = model.path();
  config.dtype = dtype;
  config.tensor_parallel_plan = plan;
  config.tensor_parallel_size = ranks;
  return config;
}

/// Elements and bytes of matrices, without padding.
struct Held {
  std::uint64_t elements = 0;
  std::uint64_t bytes = 0;

  void add(const cpu::PackedMatrix& matrix) {
    auto count = static_cast<std::uint64_t>(matrix.n) * static_cast<std::uint64_t>(matrix.k);
    elements += count;
    bytes += count * dtype_size(matrix.dtype);
  }
  void add(const LowRankLinear& linear) {
    add(linear.w);
    add(linear.v);
    add(linear.u);
  }
};

Held held_by(const DecoderWeights& weights) {
  Held held;
  held.add(weights.embedding);
  held.add(weights.head);
  for (const DecoderLayer& layer : weights.layers) {
    for (const LowRankLinear* linear : {&layer.query, &layer.key, &layer.value, &layer.output,
                                        &layer.gate, &layer.up, &layer.down}) {
      held.add(*linear);
    }
  }
  return held;
}

class TensorParallelMemory : public testing::TestWithParam<std::string> {};

TEST_P(TensorParallelMemory, WeightsAreThoseThatThePlanPredicts) {
  test::TinyConfig config;
  config.hidden = 96;
  config.intermediate = 160;
  config.heads = 8;
  config.kv_heads = 4;
  config.head_dim = 32;  // larger ones of no multiple of 32 are padded
  config.vocab = 200;
  config.mlp_rank = 21;  // no empty shares, which are padded
  for (bool all_low_rank : {true, false}) {
    for (bool tied : {true, false}) {
      config.all_low_rank = all_low_rank;
      config.tied = tied;
      test::TinyModel model(config);
      ModelConfig parsed = read_model_config(model.path());
      std::uint64_t norms = static_cast<std::uint64_t>(2 * config.layers + 1) *
                            static_cast<std::uint64_t>(config.hidden);
      for (std::string dtype : {"float32", "bfloat16", "int8"}) {
        PlannedModel planned = planned_model(parsed, 0.0, dtype);
        for (int size : {2, 3, 4}) {
          SCOPED_TRACE(dtype + ", " + std::to_string(size) + " ranks");
          auto ranks = test::make_ranks(config_for(model, GetParam(), size, dtype));
          std::uint64_t elements = 0;
          for (int rank = 0; rank < size; ++rank) {
            Held held = held_by(static_cast<CpuWorker&>(ranks->rank(rank)).decoder().weights());
            elements += held.elements;
            EXPECT_EQ(held.bytes + norms * sizeof(float),
                      rank_weight_bytes(planned, *ranks->plans()[0], rank));
          }
          std::uint64_t all = ranks->rank(0).weights_info().parameters - norms;
          if (GetParam() == "hidden_sharded") {
            EXPECT_EQ(elements, all) << "each exactly once";
          } else if (GetParam() != "dense" && GetParam() != "naive") {
            EXPECT_GT(elements, all) << "some factors are on every rank";
          }
        }
      }
    }
  }
}

TEST_P(TensorParallelMemory, OfTokenShardedLatentsIsWhatThePlanPredicts) {
  test::TinyConfig config;
  config.hidden = 96;
  config.intermediate = 160;
  config.heads = 8;
  config.kv_heads = 4;
  config.head_dim = 32;
  config.all_low_rank = true;
  config.dense_key_layer = 1;
  config.mlp_rank = 21;  // no empty shares, which are padded
  test::TinyModel model(config);
  const ModelConfig parsed = read_model_config(model.path());
  PlannedModel planned = planned_model(parsed, 0.0, "bfloat16");
  const std::uint64_t norms = static_cast<std::uint64_t>(2 * config.layers + 1) *
                              static_cast<std::uint64_t>(config.hidden) * sizeof(float);
  for (int size : {2, 3}) {
    const StepPlans plans = make_step_plans(GetParam(), planned.shape, size);
    planned.set_kv_forms(latent_kv_forms(planned, *plans[0], true));
    EngineConfig engine = config_for(model, GetParam(), size, "bfloat16");
    engine.block_size = 16 * size;
    auto ranks = test::make_ranks(engine, plans, 1, {}, {}, planned.kv_forms());
    for (int rank = 0; rank < size; ++rank) {
      auto& worker = static_cast<CpuWorker&>(ranks->rank(rank));
      EXPECT_EQ(held_by(worker.decoder().weights()).bytes + norms,
                rank_weight_bytes(planned, *plans[0], rank));
      // Of a whole block, as bytes per token may be no whole number.
      const KvInfo kv = worker.kv_info();
      const auto tokens = static_cast<std::uint64_t>(engine.block_size);
      EXPECT_EQ((kv.block_bytes + tokens - 1) / tokens, rank_kv_bytes(planned, *plans[0], rank));
      EXPECT_EQ(kv.pool_bytes, kv.block_bytes * test::kKvBlocks);
    }
  }
}

/// A number of /proc/self/status in bytes; 0 where there is none.
std::uint64_t process_status(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(key + ":")) return std::stoull(line.substr(key.size() + 1)) * 1024;
  }
  return 0;
}

/// By how much resident memory grows at most while a process of its own runs fn; 0 when it fails.
std::uint64_t peak_growth(const std::function<void()>& fn) {
  int ends[2];
  if (pipe(ends) != 0) return 0;
  pid_t child = fork();
  if (child == 0) {
    std::uint64_t growth = 0;
    try {
      std::uint64_t before = process_status("VmRSS");
      fn();
      growth = process_status("VmHWM") - before;
    } catch (...) {
    }
    bool written = write(ends[1], &growth, sizeof growth) == sizeof growth;
    _exit(written ? 0 : 1);
  }
  close(ends[1]);
  std::uint64_t growth = 0;
  if (read(ends[0], &growth, sizeof growth) != sizeof growth) growth = 0;
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return growth;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMeasures = false;
#else
constexpr bool kMeasures = true;
#endif

TEST(TensorParallelLoading, TakesTheWeightsAndOneTensorPerRank) {
  if (!kMeasures || process_status("VmHWM") == 0) GTEST_SKIP();
  test::TinyConfig config;
  config.hidden = 1024;
  config.intermediate = 2816;
  config.heads = 16;
  config.kv_heads = 8;
  config.head_dim = 64;
  config.vocab = 4096;
  config.low_rank = false;
  config.bfloat16 = true;
  test::TinyModel model(config);
  constexpr int kRanks = 4;
  const std::uint64_t weights = std::filesystem::file_size(model.weights_file());
  const std::uint64_t largest = std::uint64_t{4096} * 1024 * 2;  // the embedding
  // Threads, scratch memory, halves of huge pages.
  constexpr std::uint64_t kPerRank = 6 * kMiB;
  ASSERT_GT(weights, 48 * kMiB);
  EngineConfig engine = config_for(model, "hidden_sharded", kRanks, "bfloat16");
  ModelConfig parsed = read_model_config(engine.model);
  StepPlans plans = make_step_plans("hidden_sharded", model_shape(parsed), kRanks);

  std::uint64_t one = peak_growth([&] {
    LocalGroup group(kRanks, 1 << 20);
    CpuWorker worker(engine, parsed, RankShare(plans, 2), {}, {}, group.communicator(2), 1, 256,
                     {});
  });
  EXPECT_GT(one, weights / kRanks);
  EXPECT_LT(one, weights / kRanks + largest + kPerRank);

  std::uint64_t all =
      peak_growth([&] { RankGroup ranks(engine, parsed, {plans, {}}, 1, 256, {}); });
  EXPECT_GT(all, weights);
  EXPECT_LT(all, weights + kRanks * (largest + kPerRank));
  RecordProperty("one_rank_mib", std::to_string(one / kMiB));
  RecordProperty("all_ranks_mib", std::to_string(all / kMiB));
}

std::vector<std::string> all_plans() {
  std::vector<std::string> names;
  for (std::string_view name : plan_names()) names.emplace_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Plans, TensorParallelMemory, testing::ValuesIn(all_plans()),
                         [](const auto& plan) { return plan.param; });

}  // namespace
}  // namespace deinfer

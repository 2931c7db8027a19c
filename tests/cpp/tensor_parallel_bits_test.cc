// What ranks hold in common has the same bits on all of them, and what tiles and threads share out
// has the bits of the whole.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "rank_group_fixture.h"
#include "sanitized.h"

namespace deinfer {
namespace {

constexpr int kVocabUnit = 32;  // plans divide the vocabulary in units of so many

test::TinyConfig tiny_config() {
  test::TinyConfig config;
  config.hidden = 64;
  config.intermediate = 144;
  config.heads = 8;
  config.kv_heads = 4;
  config.all_low_rank = true;
  return config;
}

EngineConfig config_for(const test::TinyModel& model, const std::string& plan, int ranks,
                        int chunks = 1) {
  EngineConfig config;
  config.model = model.path();
  config.tensor_parallel_plan = plan;
  config.tensor_parallel_size = ranks;
  config.exchange_chunks = chunks;
  config.max_num_batched_tokens = 256;
  return config;
}

/// The logits of all rows of `batch`.
std::vector<float> all_logits(RankGroup& ranks, Batch batch) {
  auto vocab = static_cast<std::size_t>(ranks.plans()[0]->model().vocab_size);
  batch.argmax_rows.clear();
  batch.logit_rows.resize(batch.token_ids.size());
  std::iota(batch.logit_rows.begin(), batch.logit_rows.end(), 0);
  std::vector<float> all(batch.logit_rows.size() * vocab);
  test::execute(ranks, batch, [&](TeamMember& member, int first, int count, float* logits) {
    auto [begin, end] = member.share(count);
    std::copy(
        logits + static_cast<std::size_t>(begin) * vocab,
        logits + static_cast<std::size_t>(end) * vocab,
        all.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(first + begin) * vocab));
  });
  return all;
}

class TensorParallelBits : public testing::TestWithParam<std::string> {};

// Every rank computes the logits of its part of the vocabulary from its own copy of the residual
// stream. Where the embedding's rows repeat from rank to rank, so do the logits if the copies
// agree.
TEST_P(TensorParallelBits, ReplicasOfTheResidualStreamAgree) {
  test::RankBatch work({40, 1, 9, 3});
  for (bool low_rank : {true, false}) {
    for (int size : {2, 3, 4, 8}) {
      test::TinyConfig config = tiny_config();
      config.low_rank = config.all_low_rank = low_rank;
      config.vocab = kVocabUnit * size;
      config.vocab_period = kVocabUnit;
      test::TinyModel model(config);
      auto ranks = test::make_ranks(config_for(model, GetParam(), size));
      Batch batch = work.batch;
      for (TokenId& token : batch.token_ids) token %= config.vocab;
      std::vector<float> logits = all_logits(*ranks, batch);
      auto vocab = static_cast<std::size_t>(config.vocab);
      for (std::size_t i = 0; i < logits.size(); ++i) {
        std::size_t first = i / vocab * vocab + i % kVocabUnit;  // rank 0's
        ASSERT_EQ(std::memcmp(&logits[i], &logits[first], sizeof(float)), 0)
            << size << " ranks, logit " << i % vocab << " of row " << i / vocab;
      }
    }
  }
}

TEST_P(TensorParallelBits, TilesAndThreadsChangeNothing) {
  test::RankBatch work({90, 43, 20, 1});
  ASSERT_GT(work.batch.num_tokens(), kRankChunkTokens);
  for (bool all_low_rank : {true, false}) {
    test::TinyConfig config = tiny_config();
    config.all_low_rank = all_low_rank;  // else some linears are dense
    test::TinyModel model(config);
    for (int size : {2, 3}) {
      auto ranks = test::make_ranks(config_for(model, GetParam(), size));
      std::vector<float> whole = all_logits(*ranks, work.batch);
      for (int chunks : {2, 5}) {
        for (int threads : {1, 2}) {
          auto tiled = test::make_ranks(config_for(model, GetParam(), size, chunks), threads);
          EXPECT_EQ(all_logits(*tiled, work.batch), whole)
              << size << " ranks of " << threads << " threads, " << chunks << " chunks";
        }
      }
    }
  }
}

// Of few tokens the rank dimension is cut: here into parts of a linear's z, whole ones, and
// several.
TEST_P(TensorParallelBits, ChunksOfTheRankDimensionChangeNothing) {
  struct Case {
    std::string name, family, dtype;
    bool all_low_rank;
    int threads;
  };
  const std::vector<Case> cases = {
      {"float32", "llama", "float32", true, 1},  {"threads", "llama", "bfloat16", true, 2},
      {"mixed", "llama", "bfloat16", false, 2},  {"int8", "llama", "int8", true, 2},
      {"opt", "opt", "bfloat16", true, 2},       {"olmo2", "olmo2", "bfloat16", false, 1},
      {"gemma2", "gemma2", "bfloat16", true, 1},
  };
  int turn = 0;
  for (const Case& one : cases) {
    test::TinyConfig config = tiny_config();
    config.family = one.family;
    if (one.family == "opt") config.kv_heads = config.heads;
    config.all_low_rank = one.all_low_rank;
    config.mlp_rank = 110;
    config.tied = one.family != "olmo2";
    test::TinyModel model(config);
    for (const std::vector<int>& lengths : {std::vector<int>{1}, {60, 1, 9, 3}, {1, 127}}) {
      test::RankBatch work(lengths);
      ASSERT_LE(work.batch.num_tokens(), kRankChunkTokens);
      for (int size : {2, 3}) {
        auto logits = [&](int chunks) {
          EngineConfig engine = config_for(model, GetParam(), size, chunks);
          engine.dtype = one.dtype;
          return all_logits(*test::make_ranks(engine, one.threads), work.batch);
        };
        const std::vector<float> whole = logits(1);
        for (int chunks : {2, 3, 4}) {
          if (test::kSanitized && turn++ % 3 != 0) continue;
          EXPECT_EQ(logits(chunks), whole) << one.name << ", " << work.batch.num_tokens()
                                           << " tokens, " << size << " ranks, " << chunks;
        }
      }
    }
  }
}

/// Whether two results differ by rounding only.
void expect_near(const std::vector<float>& logits, const std::vector<float>& expected,
                 const std::string& what) {
  ASSERT_EQ(logits.size(), expected.size()) << what;
  float worst = 0.0f;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    float difference = std::abs(logits[i] - expected[i]);
    worst = difference <= worst ? worst : difference;  // NaN too
  }
  EXPECT_LT(worst, 1e-3f) << what;
}

// Ranks may have no column of the MLP, and no row of V.
TEST_P(TensorParallelBits, EmptySharesTakePartInExchanges) {
  test::TinyConfig config = tiny_config();
  config.intermediate = 32;
  config.mlp_rank = 1;
  test::TinyModel model(config);
  test::RankBatch work({20, 1});
  auto one = test::make_ranks(config_for(model, GetParam(), 1));
  std::vector<float> expected = all_logits(*one, work.batch);
  for (int size : {3, 4, 8}) {
    auto ranks = test::make_ranks(config_for(model, GetParam(), size, 2));
    expect_near(all_logits(*ranks, work.batch), expected, std::to_string(size) + " ranks");
  }
}

TEST_P(TensorParallelBits, BiasesAreAddedOnce) {
  test::TinyConfig config = tiny_config();
  config.biases = true;
  config.head_dim = 12;  // half a head is no multiple of 16: tiles of Q and K are padded
  test::RankBatch work({20, 1});
  for (bool all_low_rank : {true, false}) {
    config.all_low_rank = all_low_rank;
    test::TinyModel model(config);
    auto one = test::make_ranks(config_for(model, GetParam(), 1));
    std::vector<float> expected = all_logits(*one, work.batch);
    for (int size : {2, 3, 8}) {
      auto ranks = test::make_ranks(config_for(model, GetParam(), size));
      expect_near(all_logits(*ranks, work.batch), expected, std::to_string(size) + " ranks");
    }
  }
}

// Contributions have room for one row of logits at least.
TEST_P(TensorParallelBits, LargeVocabulariesTravelRowByRow) {
  test::TinyConfig config = tiny_config();
  config.vocab = 5000;
  test::TinyModel model(config);
  test::RankBatch work({6, 2});
  auto one = test::make_ranks(config_for(model, GetParam(), 1));
  std::vector<float> expected = all_logits(*one, work.batch);
  for (int size : {2, 3}) {
    EngineConfig engine = config_for(model, GetParam(), size);
    engine.max_num_batched_tokens = 8;
    auto ranks = test::make_ranks(engine);
    auto& worker = static_cast<CpuWorker&>(ranks->rank(0));
    EXPECT_EQ(worker.decoder().logit_rows(worker.communicator().max_bytes()), 1);
    expect_near(all_logits(*ranks, work.batch), expected, std::to_string(size) + " ranks");
  }
}

TEST(TensorParallelSteps, PlansThatPlaceWeightsAlikeTakeTurns) {
  test::TinyConfig config = tiny_config();
  config.all_low_rank = false;
  test::TinyModel model(config);
  ModelShape shape = model_shape(read_model_config(model.path()));
  test::RankBatch prompts({20, 30, 7});
  test::RankBatch decodes({1, 1, 1}, {20, 30, 7});
  test::RankBatch more({3, 1}, {21, 31});
  auto run = [&](RankGroup& ranks) {
    std::vector<float> logits;
    for (const test::RankBatch* work : {&prompts, &decodes, &more}) {
      std::vector<float> step = all_logits(ranks, work->batch);
      logits.insert(logits.end(), step.begin(), step.end());
    }
    return logits;
  };
  std::vector<float> expected = run(*test::make_ranks(config_for(model, "token_sharded", 1)));
  for (int size : {2, 3, 8}) {
    StepPlans plans{make_plan("two_collective", shape, size),
                    make_plan("token_sharded", shape, size)};
    EngineConfig engine = config_for(model, "auto", size, 2);
    expect_near(run(*test::make_ranks(engine, plans)), expected, std::to_string(size) + " ranks");
  }
}

std::vector<std::string> all_plans() {
  std::vector<std::string> names;
  for (std::string_view name : plan_names()) names.emplace_back(name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Plans, TensorParallelBits, testing::ValuesIn(all_plans()),
                         [](const auto& plan) { return plan.param; });

}  // namespace
}  // namespace deinfer

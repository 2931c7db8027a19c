// Sampling on the device against the host's Sampler: equal logits give equal bits.
#include <gtest/gtest.h>

#include <cstring>

#include "cuda_fixture.h"
#include "engine/candidates.h"
#include "engine/worker.h"
#include "model/cuda_sampling.h"
#include "model/cuda_step.h"
#include "sampler_rows.h"

namespace deinfer {
namespace {

using test::Dice;

/// A row to sample or, where given >= 0, to report on.
struct Case {
  std::vector<float> logits;
  SamplingParams params;
  std::vector<TokenId> tokens;
  int prompt_length = 1;
  std::vector<TokenId> banned;
  std::uint64_t seed = 0;
  TokenId given = -1;
};

Case random_case(Dice& dice, int vocab) {
  Case made;
  made.logits = test::random_row(dice, vocab);
  made.params = test::random_params(dice, vocab);
  if (dice.one_in(8)) made.params.temperature = 0.0f;
  if (dice.one_in(3)) made.params.repetition_penalty = dice.any({0.5f, 1.1f, 1e20f});
  if (dice.one_in(3)) made.params.presence_penalty = dice.any({-2.0f, 0.7f});
  if (dice.one_in(3)) made.params.frequency_penalty = dice.any({-0.3f, 1.3f});
  if (dice.one_in(3)) made.params.logprobs = dice.any({0, 1, 5, 65, cuda::kMaxReported});
  const int prompt = 1 + dice.below(30);
  const int generated = dice.below(30);
  made.prompt_length = prompt;
  const int range = dice.any({vocab, std::min(vocab, 7)});  // the same ones again and again
  for (int i = 0; i < prompt + generated; ++i) made.tokens.push_back(dice.below(range));
  if (dice.one_in(4)) {
    for (int i = 0; i < 1 + dice.below(3); ++i) made.banned.push_back(dice.below(vocab));
  }
  made.seed = static_cast<std::uint64_t>(dice.below(1 << 30));
  if (dice.one_in(6)) {
    made.given = dice.below(vocab);
    if (!made.params.logprobs) made.params.logprobs = 3;
  }
  return made;
}

SampleResult expected_of(const Case& row) {
  Sampler sampler(cpu::kernels_for(select_isa()), static_cast<int>(row.logits.size()));
  if (row.given >= 0) {
    return {row.given, sampler.report(row.logits.data(), row.given, *row.params.logprobs)};
  }
  SampleInput input{&row.params, row.tokens, row.prompt_length, row.seed, 2, row.banned};
  std::vector<float> logits = row.logits;
  SampleResult result;
  sampler.sample(input, logits.data(), result);
  return result;
}

class CudaSamplingTest : public test::CudaTest {
 protected:
  /// All rows in one step.
  std::vector<SampleResult> sample(const std::vector<Case>& rows) {
    const int count = static_cast<int>(rows.size());
    const int vocab = static_cast<int>(rows[0].logits.size());
    CudaStepLimits limits;
    limits.max_tokens = 64;
    limits.max_sequences = 1;
    limits.max_model_len = 16;
    limits.heads = 1;
    limits.vocabulary = vocab;
    limits.history_tokens = 1 << 16;
    const CudaStep step(limits);
    const CudaStep::Offsets& at = step.offsets();
    CudaSampling sampling(vocab, limits.max_tokens, static_cast<std::size_t>(at.end - at.tables),
                          *stream_);
    Batch batch;
    batch.token_ids.resize(rows.size());
    batch.positions.resize(rows.size());
    batch.slots.resize(rows.size());
    std::vector<float> logits;
    int reported = 0;
    for (int i = 0; i < count; ++i) {
      const Case& row = rows[static_cast<std::size_t>(i)];
      const int draws = static_cast<int>(row.tokens.size()) - row.prompt_length;
      const int top = row.params.logprobs.value_or(-1);
      batch.sampled.push_back({i, &row.params, row.tokens, row.prompt_length, row.banned,
                               uniform_at(row.seed, 2, draws), row.given, top});
      reported += std::max(top, 0);
      logits.insert(logits.end(), row.logits.begin(), row.logits.end());
    }
    std::vector<std::byte> block(step.capacity_bytes());
    block.resize(step.build(batch, count, block.data()));
    const cuda::DeviceBuffer inputs = on_device(block);
    const cuda::DeviceBuffer device_logits = on_device(logits);
    const int* words = inputs.as<int>();
    sampling.launch(device_logits.as<float>(),
                    reinterpret_cast<const cuda::SampleRow*>(words + at.samples), words + at.tables,
                    0, count);
    sampling.download(count, reported);
    stream_->synchronize();
    std::vector<SampleResult> results;
    const cuda::ReportedToken* next = sampling.reported().data();
    for (int i = 0; i < count; ++i) {
      const cuda::SampledToken& token = sampling.tokens()[static_cast<std::size_t>(i)];
      SampleResult& result = results.emplace_back(SampleResult{token.token, {}});
      const int top = batch.sampled[static_cast<std::size_t>(i)].top;
      if (top < 0) continue;
      std::vector<Candidate> ranked;
      for (int j = 0; j < token.top; ++j) ranked.push_back({next[j].logit, next[j].token});
      next += top;
      result.logprobs = log_probabilities(
          {{token.logit, token.token}, token.rank, token.maximum, token.total, ranked});
    }
    return results;
  }

  static void expect_equal(const SampleResult& got, const SampleResult& want) {
    EXPECT_EQ(got.token, want.token);
    ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
    for (std::size_t i = 0; i < want.logprobs.size(); ++i) {
      const TokenLogprob& a = got.logprobs[i];
      const TokenLogprob& b = want.logprobs[i];
      EXPECT_EQ(a.token, b.token);
      EXPECT_EQ(a.rank, b.rank);
      EXPECT_TRUE(a.logprob == b.logprob || (std::isnan(a.logprob) && std::isnan(b.logprob)))
          << a.logprob << " and " << b.logprob << ", entry " << i;
    }
  }

  void compare(const std::vector<Case>& rows) {
    const std::vector<SampleResult> got = sample(rows);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const SamplingParams& params = rows[i].params;
      SCOPED_TRACE(testing::Message()
                   << "row " << i << " vocabulary " << rows[i].logits.size() << " temperature "
                   << params.temperature << " top_k " << params.top_k << " top_p " << params.top_p
                   << " min_p " << params.min_p << " given " << rows[i].given);
      expect_equal(got[i], expected_of(rows[i]));
    }
  }
};

TEST_F(CudaSamplingTest, ChoosesTheTokensOfTheHost) {
  Dice dice(21);
  for (int i = 1; i < 25 && !HasFailure(); ++i) {
    const int vocab = i == 1 ? 20011 : test::random_vocab(dice, i);
    std::vector<Case> rows;
    for (int j = 0; j < 6; ++j) rows.push_back(random_case(dice, vocab));
    compare(rows);
  }
}

TEST(SamplingRoomTest, IsForOneStep) {
  const std::vector<TokenId> tokens = {1, 2, 3, 4, 5, 6}, banned = {7, 8};
  SamplingParams plain, all, generated;
  all.repetition_penalty = 1.1f;
  generated.presence_penalty = 1.0f;
  const auto row = [&](const SamplingParams& params, int top, bool bans = false) {
    return SampledRow{0,   &params, tokens, 4, bans ? banned : std::span<const TokenId>{},
                      0.0, -1,      top};
  };
  SamplingRoom room{3, 10, 7};
  EXPECT_TRUE(room.take(row(plain, -1)));
  EXPECT_FALSE(room.take(row(plain, 4))) << "no report is so long";
  EXPECT_TRUE(room.take(row(plain, 3)));
  EXPECT_TRUE(room.take(row(plain, 3)));
  EXPECT_FALSE(room.take(row(plain, 2))) << "6 of 7 are taken";
  EXPECT_TRUE(room.take(row(plain, 1)));
  EXPECT_TRUE(room.take(row(all, 0))) << "6 of 10 tokens";
  EXPECT_FALSE(room.take(row(all, 0)));
  EXPECT_TRUE(room.take(row(generated, 0, true))) << "2 generated, 2 banned";
  EXPECT_FALSE(room.take(row(generated, 0)));
  EXPECT_TRUE(room.take(row(plain, 0)));
  EXPECT_FALSE(SamplingRoom{}.take(row(plain, -1))) << "what a CPU worker offers";
}

TEST_F(CudaSamplingTest, TakesLargeVocabularies) {
  Dice dice(22);
  std::vector<Case> rows;
  for (int j = 0; j < 3; ++j) {
    rows.push_back(random_case(dice, 151'936));
    rows.back().given = -1;
  }
  rows[0].params = {.temperature = 1.0f};
  rows[1].params = {.temperature = 1.0f, .top_p = 0.95f};
  rows[2].params = {.temperature = 0.7f, .top_k = 40};
  compare(rows);
}

TEST_F(CudaSamplingTest, RowsWithoutADistribution) {
  std::vector<Case> rows;
  for (float value : {test::kNan, -test::kInf, test::kInf}) {
    for (float last : {value, test::kInf, 0.0f, -3e38f}) {
      for (bool truncates : {false, true}) {
        Case row;
        row.logits.assign(40, value);
        row.logits.back() = last;
        row.tokens = {0};
        if (truncates) row.params = {.top_p = 0.5f, .top_k = 2, .min_p = 0.5f};
        row.params.logprobs = 3;
        rows.push_back(row);
      }
    }
  }
  compare(rows);
}

TEST_F(CudaSamplingTest, TheOrderOfThreadsDoesNotMatter) {
  Dice dice(23);
  std::vector<Case> rows;
  for (int j = 0; j < 8; ++j) rows.push_back(random_case(dice, 700));
  rows[0].params = {.top_p = 0.9f, .top_k = 300, .min_p = 1e-6f, .repetition_penalty = 1.2f};
  test::in_every_order<float>([&] {
    std::vector<float> all;
    for (const SampleResult& result : sample(rows)) {
      all.push_back(static_cast<float>(result.token));
      for (const TokenLogprob& entry : result.logprobs) {
        all.push_back(entry.logprob);
        all.push_back(static_cast<float>(entry.token));
      }
    }
    return all;
  });
}

}  // namespace
}  // namespace deinfer

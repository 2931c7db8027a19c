#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>

namespace deinfer {
namespace {

constexpr int kVocab = 50;

class SamplerTest : public testing::Test {
 protected:
  SamplerTest() : sampler_(cpu::kernels_for(select_isa()), kVocab) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal(0, 2);
    for (float& logit : logits_) logit = normal(random);
  }

  SampleResult sample(const SamplingParams& params, std::uint64_t seed, int step = 0,
                      std::span<const TokenId> banned = {}) {
    std::vector<float> row(logits_, logits_ + kVocab);
    std::vector<TokenId> tokens(static_cast<std::size_t>(1 + step), 0);
    if (!history_.empty()) tokens = history_;
    SampleInput input;
    input.params = &params;
    input.tokens = tokens;
    input.prompt_length = prompt_length_;
    input.seed = seed;
    input.banned = banned;
    SampleResult result;
    sampler_.sample(input, row.data(), result);
    return result;
  }

  /// Draws often; the share of every token.
  std::map<TokenId, double> shares(const SamplingParams& params, int draws = 20000) {
    std::map<TokenId, double> found;
    for (int i = 0; i < draws; ++i) {
      found[sample(params, static_cast<std::uint64_t>(i)).token] += 1.0 / draws;
    }
    return found;
  }

  /// softmax(logits / temperature) in float64.
  std::vector<double> distribution(double temperature = 1) const {
    std::vector<double> p;
    double sum = 0;
    for (float logit : logits_) sum += p.emplace_back(std::exp(logit / temperature));
    for (double& value : p) value /= sum;
    return p;
  }

  std::vector<TokenId> by_probability() const {
    std::vector<TokenId> order;
    for (TokenId token = 0; token < kVocab; ++token) order.push_back(token);
    std::sort(order.begin(), order.end(),
              [&](TokenId a, TokenId b) { return logits_[a] > logits_[b]; });
    return order;
  }

  float logits_[kVocab];
  std::vector<TokenId> history_;
  int prompt_length_ = 1;
  Sampler sampler_;
};

TEST_F(SamplerTest, TemperatureZeroTakesTheLargest) {
  SamplingParams params;
  params.temperature = 0;
  EXPECT_EQ(sample(params, 1).token, by_probability()[0]);
}

TEST_F(SamplerTest, DrawsFromTheTemperedDistribution) {
  for (float temperature : {0.5f, 1.0f, 1.7f}) {
    SamplingParams params;
    params.temperature = temperature;
    auto found = shares(params);
    std::vector<double> expected = distribution(temperature);
    double chi_square = 0;
    int cells = 0;
    for (TokenId token = 0; token < kVocab; ++token) {
      double p = expected[static_cast<std::size_t>(token)];
      if (p * 20000 < 5) continue;
      double difference = found[token] - p;
      chi_square += difference * difference / p * 20000;
      ++cells;
    }
    EXPECT_LT(chi_square, cells + 5 * std::sqrt(2.0 * cells)) << temperature;
  }
}

TEST_F(SamplerTest, TruncationsKeepExactlyTheirSets) {
  std::vector<TokenId> order = by_probability();
  std::vector<double> p = distribution();
  auto keys = [](const std::map<TokenId, double>& shares) {
    std::set<TokenId> found;
    for (const auto& entry : shares) found.insert(entry.first);
    return found;
  };
  SamplingParams top_k;
  top_k.top_k = 4;
  EXPECT_EQ(keys(shares(top_k)), std::set<TokenId>(order.begin(), order.begin() + 4));

  SamplingParams top_p;
  top_p.top_p = 0.7f;
  std::set<TokenId> nucleus;
  double mass = 0;
  for (TokenId token : order) {
    if (mass >= 0.7) break;
    nucleus.insert(token);
    mass += p[static_cast<std::size_t>(token)];
  }
  EXPECT_EQ(keys(shares(top_p)), nucleus);

  SamplingParams min_p;
  min_p.min_p = 0.2f;
  std::set<TokenId> likely;
  for (TokenId token : order) {
    if (p[static_cast<std::size_t>(token)] >= 0.2 * p[static_cast<std::size_t>(order[0])]) {
      likely.insert(token);
    }
  }
  EXPECT_EQ(keys(shares(min_p)), likely);

  SamplingParams one;
  one.top_k = 1;
  EXPECT_EQ(keys(shares(one, 100)), std::set<TokenId>{order[0]});
  SamplingParams cold;
  cold.temperature = 1e-30f;
  EXPECT_EQ(keys(shares(cold, 100)), std::set<TokenId>{order[0]});
}

TEST_F(SamplerTest, SeedAndStepDecideTheDraw) {
  SamplingParams params;
  std::set<TokenId> by_step;
  std::set<TokenId> by_seed;
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sample(params, 7, i).token, sample(params, 7, i).token);
    by_step.insert(sample(params, 7, i).token);
    by_seed.insert(sample(params, static_cast<std::uint64_t>(i)).token);
  }
  EXPECT_GT(by_step.size(), 3u);
  EXPECT_GT(by_seed.size(), 3u);
}

TEST_F(SamplerTest, UniformIsUniform) {
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < 100000; ++i) {
    double u = uniform_at(3, i % 7, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
    squares += u * u;
  }
  EXPECT_NEAR(sum / 100000, 0.5, 0.005);
  EXPECT_NEAR(squares / 100000, 1.0 / 3, 0.005);
}

TEST_F(SamplerTest, PenaltiesFollowTheirFormulas) {
  TokenId best = by_probability()[0];
  TokenId second = by_probability()[1];
  SamplingParams params;
  params.temperature = 0;
  history_ = {best, 3, best};  // `best` in the prompt and generated once
  prompt_length_ = 2;
  float gap = logits_[best] - logits_[second];
  ASSERT_LT(gap, 2.0f);
  EXPECT_EQ(sample(params, 1).token, best);
  params.presence_penalty = gap + 0.01f;
  EXPECT_EQ(sample(params, 1).token, second);
  params.presence_penalty = gap - 0.01f;
  EXPECT_EQ(sample(params, 1).token, best);
  params.presence_penalty = 0;
  history_ = {best, 3, best, best};  // generated twice
  params.frequency_penalty = gap / 2 + 0.01f;
  EXPECT_EQ(sample(params, 1).token, second);
  params.frequency_penalty = 0;
  params.repetition_penalty = logits_[best] / logits_[second] + 0.01f;
  EXPECT_EQ(sample(params, 1).token, second);
  history_ = {best};  // repetition counts the prompt, presence does not
  prompt_length_ = 1;
  EXPECT_EQ(sample(params, 1).token, second);
  params.repetition_penalty = 1;
  params.presence_penalty = 2;
  EXPECT_EQ(sample(params, 1).token, best);
}

TEST_F(SamplerTest, BannedTokensAreNeverChosen) {
  std::vector<TokenId> banned = {by_probability()[0], by_probability()[1]};
  SamplingParams params;
  params.temperature = 0;
  EXPECT_EQ(sample(params, 1, 0, banned).token, by_probability()[2]);
}

TEST_F(SamplerTest, LogprobsDescribeTheModelItself) {
  std::vector<double> p = distribution();
  std::vector<TokenId> order = by_probability();
  SamplingParams params;
  params.temperature = 0;
  params.logprobs = 3;
  std::vector<TokenId> banned = {order[0]};
  SampleResult result = sample(params, 1, 0, banned);
  ASSERT_EQ(result.logprobs.size(), 3u) << "the chosen token is among the three";
  EXPECT_EQ(result.logprobs[0].token, order[1]);
  EXPECT_EQ(result.logprobs[0].rank, 2);
  EXPECT_EQ(result.logprobs[1].token, order[0]);
  EXPECT_EQ(result.logprobs[1].rank, 1);
  for (const TokenLogprob& entry : result.logprobs) {
    EXPECT_NEAR(entry.logprob, std::log(p[static_cast<std::size_t>(entry.token)]), 1e-5);
  }
  params.logprobs = 1000;
  EXPECT_EQ(sample(params, 1).logprobs.size(), static_cast<std::size_t>(kVocab));
}

}  // namespace
}  // namespace deinfer

// Truncation and drawing against a plain reference (full sort, float64) on random rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <random>

#include "engine/sampler.h"
#include "sampler_rows.h"
#include "sanitized.h"

namespace {
std::size_t allocations = 0;
}  // namespace

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}
// Not inlined: GCC would take free() for a mistake.
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace deinfer {
namespace {

using test::Dice;
using test::kInf;
using test::kNan;
using test::random_params;
using test::random_row;
using test::random_vocab;

/// What must be kept: the first `least` to `most` tokens of `ranked`. The two differ where rounding
/// may decide.
struct Reference {
  std::vector<Candidate> ranked;
  std::vector<double> weights;  // of ranked
  std::size_t least = 0;
  std::size_t most = 0;

  Reference(const std::vector<float>& row, const SamplingParams& params) {
    for (std::size_t j = 0; j < row.size(); ++j) {
      if (row[j] > -kInf) ranked.push_back({row[j], static_cast<TokenId>(j)});
    }
    std::sort(ranked.begin(), ranked.end(), ranks_before);
    double maximum = ranked[0].logit;
    double temperature = params.temperature;
    for (const Candidate& candidate : ranked) {
      weights.push_back(std::exp((candidate.logit - maximum) / temperature));
    }
    least = most = ranked.size();
    if (params.min_p > 0) {
      double drop = std::log(static_cast<double>(params.min_p)) * temperature;
      double rounding = 3e-7 * (std::abs(maximum) - drop);
      least = count_above(maximum + drop + rounding);
      most = count_above(maximum + drop - rounding);
    }
    if (params.top_k > 0) {
      least = std::min(least, static_cast<std::size_t>(params.top_k));
      most = std::min(most, static_cast<std::size_t>(params.top_k));
    }
    if (params.top_p < 1) {
      least = nucleus(least, params.top_p - kRounding);
      most = nucleus(most, params.top_p + kRounding);
    }
    least = std::max<std::size_t>(least, 1);
  }

  static constexpr double kRounding = 1e-6;

  std::size_t count_above(double bound) const {
    auto end = std::partition_point(ranked.begin(), ranked.end(),
                                    [&](const Candidate& c) { return c.logit >= bound; });
    return static_cast<std::size_t>(end - ranked.begin());
  }
  std::size_t nucleus(std::size_t among, double share) const {
    double total = 0;
    for (std::size_t i = 0; i < among; ++i) total += weights[i];
    double sum = 0;
    for (std::size_t i = 0; i < among; ++i) {
      if (sum >= share * total) return i;
      sum += weights[i];
    }
    return among;
  }
};

/// Whether u of the probability of the first `kept` falls to `token`, within rounding.
void expect_drawn(const Reference& reference, std::size_t kept, bool by_rank, double u,
                  TokenId token) {
  std::vector<std::size_t> order(kept);
  for (std::size_t i = 0; i < kept; ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return by_rank ? a > b : reference.ranked[a].token < reference.ranked[b].token;
  });
  double total = 0;
  for (std::size_t i : order) total += reference.weights[i];
  double sum = 0;
  for (std::size_t i : order) {
    double weight = reference.weights[i];
    if (reference.ranked[i].token == token) {
      EXPECT_GT(weight, 0);
      EXPECT_LE(sum / total, u + 3e-6);
      EXPECT_GE((sum + weight) / total, u - 3e-6);
      return;
    }
    sum += weight;
  }
  ADD_FAILURE() << "token " << token << " was not kept";
}

std::vector<TokenId> kept_tokens(const CandidateView& view) {
  std::vector<TokenId> kept;
  for (int i = 0; i < view.size; ++i) {
    bool whole_row = view.tokens == nullptr;
    if (whole_row && !(view[i].logit > -kInf)) continue;
    kept.push_back(view[i].token);
  }
  return kept;
}

TEST(SamplerPropertyTest, KeepsAndDrawsAsTheReference) {
  Dice dice(5);
  int exact = 0;
  constexpr int kRows = test::repeats(4000, 1000);
  const std::vector<Isa> isas = detect_isas();
  for (int i = 0; i < kRows && !testing::Test::HasFailure(); ++i) {
    int vocab = random_vocab(dice, i);
    const std::vector<float> row = random_row(dice, vocab);
    SamplingParams params = random_params(dice, vocab);
    SCOPED_TRACE(testing::Message() << "row " << i << " vocab " << vocab << " temperature "
                                    << params.temperature << " top_k " << params.top_k << " top_p "
                                    << params.top_p << " min_p " << params.min_p);
    Reference reference(row, params);
    exact += reference.least == reference.most;

    const cpu::KernelTable& kernels =
        cpu::kernels_for(isas[static_cast<std::size_t>(i) % isas.size()]);
    Candidates candidates(kernels, vocab);
    float maximum = candidates.reset(row.data());
    ASSERT_EQ(maximum, reference.ranked[0].logit);
    Softmax softmax = truncate(params, maximum, candidates);
    std::vector<TokenId> kept = kept_tokens(candidates.kept());
    ASSERT_GE(kept.size(), reference.least);
    ASSERT_LE(kept.size(), reference.most);
    std::vector<TokenId> want;
    for (std::size_t j = 0; j < kept.size(); ++j) want.push_back(reference.ranked[j].token);
    std::sort(want.begin(), want.end());
    ASSERT_EQ(kept, want);

    bool by_rank = params.top_p < 1;
    for (double u : {0.0, 0.5, 1 - 0x1p-53}) {
      TokenId token =
          by_rank ? candidates.draw_by_rank(softmax, u) : candidates.draw_by_token(softmax, u);
      expect_drawn(reference, kept.size(), by_rank, u, token);
    }
    Sampler sampler(kernels, vocab);
    Sampler scalar(cpu::kernels_for(Isa::kScalar), vocab);
    TokenId history[] = {0};
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      SampleInput input;
      input.params = &params;
      input.tokens = history;
      input.prompt_length = 1;
      input.seed = seed + static_cast<std::uint64_t>(i) * 4;
      SampleResult result, same;
      std::vector<float> copy = row;
      sampler.sample(input, copy.data(), result);
      scalar.sample(input, copy.data(), same);
      EXPECT_EQ(result.token, same.token);
      expect_drawn(reference, kept.size(), by_rank, uniform_at(input.seed, 0, 0), result.token);
    }
  }
  EXPECT_GT(exact, kRows * 4 / 5) << "the tolerance decides too often";
}

TEST(SamplerPropertyTest, RowsWithoutADistribution) {
  for (Isa isa : detect_isas()) {
    for (std::size_t vocab : {1u, 5u, 40u, 3000u}) {
      Sampler sampler(cpu::kernels_for(isa), static_cast<int>(vocab));
      auto token = [&](std::vector<float> row, auto... set) {
        TokenId history[] = {0};
        SamplingParams params;
        (set(params), ...);
        SampleInput input;
        input.params = &params;
        input.tokens = history;
        input.prompt_length = 1;
        SampleResult result;
        sampler.sample(input, row.data(), result);
        return result.token;
      };
      auto top_k = [](SamplingParams& params) { params.top_k = 2; };
      auto top_p = [](SamplingParams& params) { params.top_p = 0.5f; };
      auto min_p = [](SamplingParams& params) { params.min_p = 0.5f; };
      for (float value : {kNan, -kInf, kInf}) {
        std::vector<float> row(vocab, value);
        EXPECT_EQ(token(row), 0);
        EXPECT_EQ(token(row, top_k, top_p, min_p), 0);
      }
      auto last = static_cast<TokenId>(vocab - 1);
      for (float value : {kNan, -kInf}) {
        std::vector<float> row(vocab, value);
        for (float only : {kInf, 0.0f, -3e38f}) {
          row.back() = only;
          EXPECT_EQ(token(row), last);
          EXPECT_EQ(token(row, top_k), last);
          EXPECT_EQ(token(row, top_p), last);
          EXPECT_EQ(token(row, min_p), last);
          EXPECT_EQ(token(row, top_k, top_p, min_p), last);
        }
      }
    }
  }
}

TEST(SamplerPropertyTest, ReportsAreTheTopOfTheRow) {
  Dice dice(8);
  for (int i = 0; i < 400; ++i) {
    int vocab = random_vocab(dice, i);
    std::vector<float> row = random_row(dice, vocab);
    for (float& logit : row) {
      if (std::isnan(logit)) logit = -kInf;
    }
    int top = dice.any({0, 1, 2, 5, 20, 100, vocab + 3});
    auto chosen = static_cast<TokenId>(dice.below(vocab));
    SCOPED_TRACE(testing::Message() << "row " << i << " vocab " << vocab << " top " << top);
    std::vector<Candidate> ranked;
    for (TokenId t = 0; t < vocab; ++t) ranked.push_back({row[static_cast<std::size_t>(t)], t});
    std::sort(ranked.begin(), ranked.end(), ranks_before);
    double sum = 0;
    for (const Candidate& c : ranked)
      sum += std::exp(static_cast<double>(c.logit) - ranked[0].logit);

    Sampler sampler(cpu::kernels_for(select_isa()), vocab);
    std::vector<TokenLogprob> report = sampler.report(row.data(), chosen, top);
    auto expect_entry = [&](const TokenLogprob& entry, const Candidate& want) {
      EXPECT_EQ(entry.token, want.token);
      double logprob = static_cast<double>(want.logit) - ranked[0].logit - std::log(sum);
      if (std::isinf(want.logit)) {
        EXPECT_EQ(entry.logprob, -kInf);
      } else {
        EXPECT_NEAR(entry.logprob, logprob, 2e-5 + 1e-6 * std::abs(logprob));
      }
    };
    float logit = row[static_cast<std::size_t>(chosen)];
    expect_entry(report.at(0), {logit, chosen});
    EXPECT_EQ(report[0].rank, 1 + std::count_if(row.begin(), row.end(),
                                                [&](float other) { return other > logit; }));
    std::size_t next = 1;
    for (int rank = 1; rank <= std::min(top, vocab); ++rank) {
      const Candidate& want = ranked[static_cast<std::size_t>(rank - 1)];
      if (want.token == chosen) continue;
      ASSERT_LT(next, report.size());
      EXPECT_EQ(report[next].rank, rank);
      expect_entry(report[next++], want);
    }
    EXPECT_EQ(next, report.size());
  }
}

TEST(SamplerPropertyTest, TokensNeedNoAllocation) {
  Dice dice(9);
  constexpr int kVocab = 5000;
  std::vector<SamplingParams> all;
  for (int i = 0; i < 50; ++i) {
    all.push_back(random_params(dice, kVocab));
    all.back().repetition_penalty = 1.1f;
    all.back().frequency_penalty = 0.5f;
  }
  all.back().temperature = 0;
  std::vector<std::vector<float>> rows;
  for (int i = 0; i < 50; ++i) rows.push_back(random_row(dice, kVocab));
  std::vector<TokenId> tokens = {1, 2, 3, 2, 4999};
  Sampler sampler(cpu::kernels_for(select_isa()), kVocab);
  SampleResult result;
  std::size_t before = allocations;
  EXPECT_GT(before, 0u) << "nothing is counted";
  for (std::size_t i = 0; i < all.size(); ++i) {
    SampleInput input;
    input.params = &all[i];
    input.tokens = tokens;
    input.prompt_length = 2;
    input.seed = i;
    sampler.sample(input, rows[i].data(), result);
  }
  EXPECT_EQ(allocations, before);
}

}  // namespace
}  // namespace deinfer

#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/sampling.h"

namespace deinfer {
namespace {

// Final mixer of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

bool changes_logits(const SampleInput& input) {
  return !input.banned.empty() || has_penalties(*input.params);
}

}  // namespace

double uniform_at(std::uint64_t seed, int index, int step) {
  std::uint64_t counter =
      (static_cast<std::uint64_t>(index) << 32) | static_cast<std::uint32_t>(step);
  return static_cast<double>(mix(mix(seed) ^ counter) >> 11) * 0x1p-53;
}

Sampler::Sampler(const cpu::KernelTable& kernels, int vocab_size)
    : kernels_(kernels),
      vocab_size_(vocab_size),
      candidates_(kernels, vocab_size),
      counts_(static_cast<std::size_t>(vocab_size)) {
  raw_.reserve(static_cast<std::size_t>(vocab_size));
}

void Sampler::sample(const SampleInput& input, float* logits, SampleResult& result) {
  const SamplingParams& params = *input.params;
  // Log-probabilities describe the model, not the penalties, so the raw logits are needed after.
  const float* raw = logits;
  if (params.logprobs && changes_logits(input)) {
    raw_.assign(logits, logits + vocab_size_);
    raw = raw_.data();
  }
  for (TokenId token : input.banned) logits[token] = -std::numeric_limits<float>::infinity();
  apply_penalties(input, logits);
  result.logprobs.clear();
  if (params.temperature == 0.0f) {
    float value = 0;
    kernels_.argmax(logits, vocab_size_, &value, &result.token);
  } else {
    result.token = draw(input, logits);
  }
  if (params.logprobs) result.logprobs = report(raw, result.token, *params.logprobs);
}

void Sampler::apply_penalties(const SampleInput& input, float* logits) {
  const SamplingParams& params = *input.params;
  auto generated = input.tokens.subspan(static_cast<std::size_t>(input.prompt_length));
  if (params.repetition_penalty != 1.0f) {
    for (TokenId token : input.tokens) {
      std::int32_t& seen = counts_[static_cast<std::size_t>(token)];
      if (seen != 0) continue;
      seen = 1;
      float& logit = logits[token];
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    }
    for (TokenId token : input.tokens) counts_[static_cast<std::size_t>(token)] = 0;
  }
  if (params.presence_penalty == 0.0f && params.frequency_penalty == 0.0f) return;
  for (TokenId token : generated) ++counts_[static_cast<std::size_t>(token)];
  for (TokenId token : generated) {
    std::int32_t& count = counts_[static_cast<std::size_t>(token)];
    if (count == 0) continue;
    logits[token] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
    count = 0;
  }
}

TokenId Sampler::draw(const SampleInput& input, const float* logits) {
  const SamplingParams& params = *input.params;
  float maximum = candidates_.reset(logits);
  if (!std::isfinite(maximum)) {  // no distribution to draw from
    int best = 0;
    kernels_.argmax(logits, vocab_size_, &maximum, &best);
    return best;
  }
  Softmax softmax = truncate(params, maximum, candidates_);
  int step = static_cast<int>(input.tokens.size()) - input.prompt_length;
  double u = uniform_at(input.seed, input.index, step);
  return params.top_p < 1.0f ? candidates_.draw_by_rank(softmax, u)
                             : candidates_.draw_by_token(softmax, u);
}

Softmax truncate(const SamplingParams& params, float maximum, Candidates& candidates) {
  Softmax softmax = {maximum, softmax_scale(params.temperature)};
  float lowest = std::numeric_limits<float>::lowest();  // all but NaN and -inf
  if (params.min_p > 0.0f) {
    lowest = std::max(lowest, maximum + min_p_drop(params.min_p, params.temperature));
  }
  if (params.top_k > 0 && params.top_k < candidates.kept().size) {
    candidates.keep_top_k(params.top_k, lowest);
  } else if (params.min_p > 0.0f) {
    candidates.keep_at_least(lowest);
  }
  if (params.top_p < 1.0f) candidates.keep_top_p(params.top_p, softmax);
  return softmax;
}

std::vector<TokenLogprob> Sampler::report(const float* logits, TokenId chosen, int top) {
  RawReport report{{logits[chosen], chosen}, 1, candidates_.reset(logits), 0.0, {}};
  report.total = candidates_.mass({report.maximum, 1.0f});
  for (TokenId token = 0; token < vocab_size_; ++token) {
    report.rank += logits[token] > logits[chosen];
  }
  ranked_.clear();
  top = std::min(top, vocab_size_);
  if (top > 0) {
    candidates_.keep_top_k(top, -std::numeric_limits<float>::infinity());
    for (int i = 0; i < candidates_.kept().size; ++i) ranked_.push_back(candidates_.kept()[i]);
    std::sort(ranked_.begin(), ranked_.end(), ranks_before);
  }
  report.ranked = ranked_;
  return log_probabilities(report);
}

std::vector<TokenLogprob> log_probabilities(const RawReport& report) {
  const auto log_sum = static_cast<float>(std::log(report.total));
  auto entry = [&](const Candidate& candidate, int rank) {
    return TokenLogprob{candidate.token, candidate.logit - report.maximum - log_sum, rank};
  };
  std::vector<TokenLogprob> entries = {entry(report.chosen, report.rank)};
  int place = 0;
  for (const Candidate& candidate : report.ranked) {
    ++place;
    if (candidate.token != report.chosen.token) entries.push_back(entry(candidate, place));
  }
  return entries;
}

}  // namespace deinfer

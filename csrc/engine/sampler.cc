#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace deinfer {
namespace {

// Final mixer of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Descending logits; ties by ascending token, so that every order is total.
bool ranks_before(float logit_a, TokenId a, float logit_b, TokenId b) {
  return logit_a != logit_b ? logit_a > logit_b : a < b;
}

}  // namespace

double uniform_at(std::uint64_t seed, int index, int step) {
  std::uint64_t counter =
      (static_cast<std::uint64_t>(index) << 32) | static_cast<std::uint32_t>(step);
  return static_cast<double>(mix(mix(seed) ^ counter) >> 11) * 0x1p-53;
}

Sampler::Sampler(const cpu::KernelTable& kernels, int vocab_size)
    : kernels_(kernels), vocab_size_(vocab_size) {
  candidates_.reserve(static_cast<std::size_t>(vocab_size));
  counts_.resize(static_cast<std::size_t>(vocab_size));
}

void Sampler::sample(const SampleInput& input, float* logits, SampleResult& result) {
  const SamplingParams& params = *input.params;
  // Log-probabilities describe the model, not the penalties, so the raw logits are needed after.
  if (params.logprobs) raw_.assign(logits, logits + vocab_size_);
  for (TokenId token : input.banned) logits[token] = -std::numeric_limits<float>::infinity();
  apply_penalties(input, logits);
  result.logprobs.clear();
  if (params.temperature == 0.0f) {
    float value = 0;
    kernels_.argmax(logits, vocab_size_, &value, &result.token);
  } else {
    result.token = draw(input, logits);
  }
  if (params.logprobs) result.logprobs = report(raw_.data(), result.token, *params.logprobs);
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
  float maximum = 0;
  int best = 0;
  kernels_.argmax(logits, vocab_size_, &maximum, &best);
  if (!std::isfinite(maximum)) return best;  // no distribution to draw from
  float lowest = params.min_p > 0 ? maximum + std::log(params.min_p) * params.temperature
                                  : -std::numeric_limits<float>::infinity();
  candidates_.clear();
  for (TokenId token = 0; token < vocab_size_; ++token) {
    float logit = logits[token];
    if (logit >= lowest && logit > -std::numeric_limits<float>::infinity()) {
      candidates_.push_back({logit, token});
    }
  }
  if (params.top_k > 0) keep_top_k(params.top_k);
  if (params.top_p < 1.0f) keep_top_p(params.top_p, maximum, params.temperature);
  double total = 0;
  for (Candidate& candidate : candidates_) {
    candidate.logit = std::exp((candidate.logit - maximum) / params.temperature);
    total += candidate.logit;
  }
  int step = static_cast<int>(input.tokens.size()) - input.prompt_length;
  double target = uniform_at(input.seed, input.index, step) * total;
  double sum = 0;
  TokenId last = best;
  for (const Candidate& candidate : candidates_) {
    if (candidate.logit <= 0) continue;
    last = candidate.token;
    sum += candidate.logit;
    if (sum > target) break;
  }
  return last;
}

void Sampler::keep_top_k(int k) {
  if (static_cast<std::size_t>(k) >= candidates_.size()) return;
  auto before = [](const Candidate& a, const Candidate& b) {
    return ranks_before(a.logit, a.token, b.logit, b.token);
  };
  auto end = candidates_.begin() + k;
  std::nth_element(candidates_.begin(), end - 1, candidates_.end(), before);
  candidates_.erase(end, candidates_.end());
  // The order in which probabilities are summed must not depend on nth_element's internals.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
}

void Sampler::keep_top_p(float top_p, float maximum, float temperature) {
  double total = 0;
  for (const Candidate& candidate : candidates_) {
    total += std::exp((candidate.logit - maximum) / temperature);
  }
  // A heap gives the most likely ones in order without sorting the vocabulary.
  auto after = [](const Candidate& a, const Candidate& b) {
    return ranks_before(b.logit, b.token, a.logit, a.token);
  };
  std::make_heap(candidates_.begin(), candidates_.end(), after);
  double kept = 0;
  auto heap_end = candidates_.end();
  while (heap_end != candidates_.begin() && kept < top_p * total) {
    std::pop_heap(candidates_.begin(), heap_end, after);
    --heap_end;
    kept += std::exp((heap_end->logit - maximum) / temperature);
  }
  candidates_.erase(candidates_.begin(), heap_end);
}

std::vector<TokenLogprob> Sampler::report(const float* logits, TokenId chosen, int top) {
  float maximum = 0;
  int best = 0;
  kernels_.argmax(logits, vocab_size_, &maximum, &best);
  float log_sum = std::log(kernels_.exp_sum(logits, vocab_size_, maximum, 1.0f));
  auto entry = [&](TokenId token, int rank) {
    return TokenLogprob{token, logits[token] - maximum - log_sum, rank};
  };
  int rank = 1;
  for (TokenId token = 0; token < vocab_size_; ++token) rank += logits[token] > logits[chosen];
  std::vector<TokenLogprob> entries = {entry(chosen, rank)};
  top = std::min(top, vocab_size_);
  if (top == 0) return entries;
  candidates_.clear();
  for (TokenId token = 0; token < vocab_size_; ++token) {
    candidates_.push_back({logits[token], token});
  }
  std::partial_sort(candidates_.begin(), candidates_.begin() + top, candidates_.end(),
                    [](const Candidate& a, const Candidate& b) {
                      return ranks_before(a.logit, a.token, b.logit, b.token);
                    });
  for (int i = 0; i < top; ++i) {
    TokenId token = candidates_[static_cast<std::size_t>(i)].token;
    if (token != chosen) entries.push_back(entry(token, i + 1));
  }
  return entries;
}

}  // namespace deinfer

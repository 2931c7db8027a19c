// What an engine answers to a few requests, to be compared with what others answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "deinfer/engine.h"

namespace deinfer::test {

struct Outcome {
  std::vector<float> logits;  // of the prompts of some requests
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  bool operator==(const Outcome&) const = default;
};

/// Requests with random prompts of these lengths below token 97: greedy ones and, of length 23, a
/// sampled one with log-probabilities. A prompt of 310 has the one before as its prefix. Logits are
/// those of prompts whose length is in `with_logits`.
inline Outcome run_requests(Engine& engine, const std::vector<int>& lengths, int max_tokens,
                            const std::set<int>& with_logits) {
  std::mt19937 random(7);
  std::vector<RequestId> ids;
  std::vector<TokenId> prompt;
  for (int length : lengths) {
    if (length != 310) prompt.clear();
    while (static_cast<int>(prompt.size()) < length) {
      prompt.push_back(static_cast<TokenId>(random() % 97));
    }
    SamplingParams params;
    params.temperature = length == 23 ? 0.8f : 0.0f;
    params.seed = 3;
    params.max_tokens = max_tokens;
    params.ignore_eos = true;
    params.prompt_logits = with_logits.contains(length);
    if (length == 23) params.logprobs = 2;
    ids.push_back(engine.submit(prompt, params));
  }
  std::vector<Outcome> runs(ids.size());
  while (engine.has_unfinished_requests()) {
    for (RequestOutput& output : engine.step()) {
      Outcome& request = runs[static_cast<std::size_t>(
          std::find(ids.begin(), ids.end(), output.request_id) - ids.begin())];
      request.logits.insert(request.logits.end(), output.prompt_logits.begin(),
                            output.prompt_logits.end());
      for (const SequenceOutput& sample : output.outputs) {
        request.tokens.insert(request.tokens.end(), sample.new_token_ids.begin(),
                              sample.new_token_ids.end());
        for (const auto& entries : sample.logprobs) {
          for (const TokenLogprob& entry : entries) request.logprobs.push_back(entry.logprob);
        }
      }
    }
  }
  Outcome all;
  for (const Outcome& one : runs) {
    all.logits.insert(all.logits.end(), one.logits.begin(), one.logits.end());
    all.tokens.insert(all.tokens.end(), one.tokens.begin(), one.tokens.end());
    all.logprobs.insert(all.logprobs.end(), one.logprobs.begin(), one.logprobs.end());
  }
  return all;
}

/// |a - b| / |b|; 1 where they cannot be compared.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size() || a.empty()) return 1.0;
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(b[i], 2);
  }
  return std::sqrt(difference / size);
}

}  // namespace deinfer::test

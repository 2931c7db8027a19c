// Small engines on a CUDA device, and what they answer.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "deinfer/engine.h"
#include "tiny_model.h"

namespace deinfer::test {

inline EngineConfig config_for(const TinyModel& model, const std::string& device) {
  EngineConfig config;
  config.model = model.path();
  config.device = device;
  config.dtype = "bfloat16";
  config.num_threads = 1;
  config.max_num_seqs = 16;
  config.max_num_batched_tokens = 96;
  config.num_kv_blocks = 64;
  config.hidden_state_layers = {0, 1, 2};
  return config;
}

/// What a request gave.
struct Answer {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;       // of the tokens
  std::vector<float> prompt_logits;  // [prompt, vocabulary]
  bool operator==(const Answer&) const = default;
};

/// A prompt, and how to go on.
struct Request {
  std::vector<TokenId> prompt;
  SamplingParams params;
};

inline std::vector<TokenId> prompt_of(int length, int seed) {
  std::vector<TokenId> prompt;
  for (int i = 0; i < length; ++i) prompt.push_back((seed * 31 + i * (7 + seed)) % 97);
  return prompt;
}

/// All requests at once, or one after another.
inline std::vector<Answer> generate(Engine& engine, const std::vector<Request>& requests,
                                    bool together = true) {
  std::vector<Answer> answers(requests.size());
  std::map<RequestId, std::size_t> places;
  auto drain = [&] {
    while (engine.has_unfinished_requests()) {
      for (RequestOutput& output : engine.step()) {
        Answer& answer = answers[places.at(output.request_id)];
        if (!output.prompt_logits.empty()) answer.prompt_logits = output.prompt_logits;
        for (SequenceOutput& sample : output.outputs) {
          answer.tokens.insert(answer.tokens.end(), sample.new_token_ids.begin(),
                               sample.new_token_ids.end());
          for (const auto& entries : sample.logprobs) answer.logprobs.push_back(entries[0].logprob);
        }
      }
    }
  };
  for (std::size_t i = 0; i < requests.size(); ++i) {
    places[engine.submit(requests[i].prompt, requests[i].params)] = i;
    if (!together) drain();
  }
  drain();
  return answers;
}

/// Of the distances between two vectors of equal size.
inline double root_mean_square(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

inline Request greedy(int length, int seed, int tokens) {
  Request request{prompt_of(length, seed), {}};
  request.params.temperature = 0.0f;
  request.params.max_tokens = tokens;
  request.params.ignore_eos = true;
  return request;
}

/// A prompt whose logits are wanted, and greedy ones.
inline std::vector<Request> requests_of(int prompt_length) {
  std::vector<Request> requests = {greedy(prompt_length, 1, 1), greedy(5, 2, 3), greedy(12, 3, 3)};
  requests[0].params.prompt_logits = true;
  return requests;
}

/// What one engine makes of a prompt and of tokens that others generate.
class Comparison {
 public:
  Comparison(const EngineConfig& config, int prompt_length)
      : requests_(requests_of(prompt_length)),
        engine_(config),
        logits_(generate(engine_, {requests_[0]})[0].prompt_logits) {}

  /// Of the logits of the prompt.
  double distance(const EngineConfig& config) const {
    Engine other(config);
    return root_mean_square(generate(other, {requests_[0]})[0].prompt_logits, logits_);
  }

  /// Prefill: the distance of the logits of the prompt. Decode: by how much the other's tokens are
  /// less likely than the most likely ones, at most, in logits.
  struct Difference {
    double logits = 0, tokens = 0;
  };
  Difference difference(Engine& other) {
    const std::vector<Answer> got = generate(other, requests_);
    Difference difference{root_mean_square(got[0].prompt_logits, logits_), 0};
    const std::size_t vocabulary = logits_.size() / requests_[0].prompt.size();
    for (std::size_t i = 1; i < requests_.size(); ++i) {
      Request all = requests_[i];
      all.prompt.insert(all.prompt.end(), got[i].tokens.begin(), got[i].tokens.end());
      all.params.max_tokens = 1;
      all.params.prompt_logits = true;
      const std::vector<float> logits = generate(engine_, {all})[0].prompt_logits;
      std::size_t at = (requests_[i].prompt.size() - 1) * vocabulary;
      for (const TokenId token : got[i].tokens) {
        const std::span row = std::span(logits).subspan(at, vocabulary);
        const float best = *std::max_element(row.begin(), row.end());
        difference.tokens =
            std::max<double>(difference.tokens, best - row[static_cast<std::size_t>(token)]);
        at += vocabulary;
      }
    }
    return difference;
  }

  /// It is small beside `rounding`: what bf16 makes of the logits. `factor`: of the prompt's.
  void check(Engine& other, double factor, double rounding) {
    const Difference found = difference(other);
    EXPECT_LE(found.logits, factor * rounding + 1e-3);
    EXPECT_LE(found.tokens, 6 * rounding + 0.02);
  }

 private:
  std::vector<Request> requests_;
  Engine engine_;
  std::vector<float> logits_;
};

}  // namespace deinfer::test

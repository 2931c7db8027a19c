// Small engines on a CUDA device, and what they answer.
#pragma once

#include <gtest/gtest.h>

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

}  // namespace deinfer::test

// How the tokens of a request are chosen. Names and defaults follow vLLM.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "deinfer/export.h"

namespace deinfer {

using TokenId = std::int32_t;

struct DEINFER_API SamplingParams {
  int n = 1;                            // independent samples of one prompt, >= 1
  std::optional<int> max_tokens = 16;   // generated tokens, >= 1; empty: until the context is full
  int min_tokens = 0;                   // no stop token before so many generated tokens
  float temperature = 1.0f;             // >= 0; 0 selects greedy decoding
  float top_p = 1.0f;                   // (0, 1]: smallest set of tokens with this probability
  int top_k = 0;                        // >= 1 keeps the k most likely; 0 and -1 keep all
  float min_p = 0.0f;                   // [0, 1]: drop tokens below min_p x the largest probability
  float repetition_penalty = 1.0f;      // > 0; divides positive logits of seen tokens (CTRL)
  float presence_penalty = 0.0f;        // [-2, 2]; subtracted once from generated tokens
  float frequency_penalty = 0.0f;       // [-2, 2]; subtracted per occurrence
  std::optional<std::uint64_t> seed;    // empty: derived from the engine's seed and request number
  std::vector<TokenId> stop_token_ids;  // end the sample, besides the model's end-of-sequence ids
  bool ignore_eos = false;              // do not stop at the model's end-of-sequence ids
  std::optional<int> logprobs;          // >= 0: report the chosen token and the k most likely
  std::optional<int> prompt_logprobs;   // the same for every prompt token but the first
  bool prompt_logits = false;           // return fp32 logits of all prompt positions (large)
  int priority = 0;                     // higher runs earlier
  std::optional<float> expected_tokens;  // > 0: the caller's guess at the length of the answer,
                                         // which scheduling prefers to any prediction

  /// Throws Error(kInvalidArgument) naming the field and its value.
  void validate() const;
};

/// One entry of a log-probability report (natural logarithm of the model's own distribution, before
/// penalties, temperature and truncation).
struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0.0f;
  int rank = 0;  // 1 is the most likely token of the vocabulary
};

}  // namespace deinfer

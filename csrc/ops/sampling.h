// What samplers on the host and on devices compute alike from a request's parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "deinfer/sampling_params.h"

namespace deinfer {

/// A row of a batch whose token the worker chooses by itself.
struct SampledRow {
  int row = 0;
  const SamplingParams* params = nullptr;
  std::span<const TokenId> tokens;  // prompt and generated so far
  int prompt_length = 0;
  std::span<const TokenId> banned;  // never chosen in this step (min_tokens)
  double uniform = 0.0;             // in [0, 1), for the draw
  TokenId given = -1;               // not -1: it is reported on, and nothing is drawn
  int top = -1;                     // most likely tokens that are reported; -1: no report
};

/// Whether logits depend on the tokens so far.
inline bool has_penalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
         params.frequency_penalty != 0.0f;
}

/// The tokens whose logits penalties change.
inline std::span<const TokenId> penalized_tokens(const SampledRow& row) {
  if (!has_penalties(*row.params)) return {};
  const bool prompt_too = row.params->repetition_penalty != 1.0f;
  return row.tokens.subspan(prompt_too ? 0 : static_cast<std::size_t>(row.prompt_length));
}

/// What logits less the largest are multiplied with; a tiny temperature, not 0, must not make 0 x
/// infinity of the largest.
inline float softmax_scale(float temperature) {
  return std::min(1.0f / temperature, std::numeric_limits<float>::max());
}

/// min_p > 0 keeps the logits from the largest plus this on.
inline float min_p_drop(float min_p, float temperature) { return std::log(min_p) * temperature; }

/// log of half of (1 - top_p) / vocab: tokens of that share of the total or less cannot make up
/// 1 - top_p of it together; half leaves room for rounding.
inline double tail_log_share(float top_p, int vocab) {
  return std::log(0.5 * (1.0 - static_cast<double>(top_p)) / vocab);
}

}  // namespace deinfer

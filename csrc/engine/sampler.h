// From logits to tokens: penalties, truncation, sampling and log-probability reports.
//
// Everything is a function of the row's logits, the request's parameters and (seed, sample, step),
// so that a request's tokens do not depend on what else is in the batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deinfer/sampling_params.h"
#include "engine/candidates.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer {

/// One row to sample.
struct SampleInput {
  const SamplingParams* params = nullptr;
  std::span<const TokenId> tokens;  // prompt and generated so far
  int prompt_length = 0;
  std::uint64_t seed = 0;
  int index = 0;                    // of the sample within its request
  std::span<const TokenId> banned;  // never chosen in this step (min_tokens)
};

struct SampleResult {
  TokenId token = 0;
  std::vector<TokenLogprob> logprobs;  // as params->logprobs asks; else empty
};

/// What a report is made of.
struct RawReport {
  Candidate chosen;
  int rank = 0;                       // of the chosen token, from 1
  float maximum = 0.0f;               // the largest logit
  double total = 0.0;                 // sum of exp(logit - maximum)
  std::span<const Candidate> ranked;  // the most likely tokens, in order
};

/// The chosen token first, then the others in descending order.
std::vector<TokenLogprob> log_probabilities(const RawReport& report);

/// A uniform double in [0, 1): a counter-based generator, one value per (seed, sample, step).
double uniform_at(std::uint64_t seed, int index, int step);

/// One thread's sampler; holds the scratch memory.
class Sampler {
 public:
  Sampler(const cpu::KernelTable& kernels, int vocab_size);

  /// Chooses the next token from logits[vocab], which it may overwrite.
  void sample(const SampleInput& input, float* logits, SampleResult& result);

  /// The report for `chosen` and the `top` most likely tokens of logits[vocab]: the chosen token
  /// first, then the others in descending order. Tokens whose logit is NaN are not among the most
  /// likely.
  std::vector<TokenLogprob> report(const float* logits, TokenId chosen, int top);

 private:
  void apply_penalties(const SampleInput& input, float* logits);
  TokenId draw(const SampleInput& input, const float* logits);

  const cpu::KernelTable& kernels_;
  int vocab_size_;
  Candidates candidates_;
  std::vector<float> raw_;            // [vocab] logits before penalties, when a report wants them
  std::vector<std::int32_t> counts_;  // [vocab] occurrences; zero between calls
  std::vector<Candidate> ranked_;     // of a report
};

/// Drops from `candidates`, just reset, what top_k, top_p and min_p exclude for a row with this
/// largest logit, which is finite. The temperature must not be 0. Exact but for rounding: top_p may
/// keep a token more or less where the sum of probabilities comes within about 1e-6 of it.
Softmax truncate(const SamplingParams& params, float maximum, Candidates& candidates);

}  // namespace deinfer

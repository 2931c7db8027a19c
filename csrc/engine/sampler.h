// From logits to tokens: penalties, truncation, sampling and log-probability reports.
//
// Everything is a function of the row's logits, the request's parameters and (seed, sample, step),
// so that a request's tokens do not depend on what else is in the batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deinfer/sampling_params.h"
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

/// A uniform double in [0, 1): a counter-based generator, one value per (seed, sample, step).
double uniform_at(std::uint64_t seed, int index, int step);

/// One thread's sampler; holds the scratch memory.
class Sampler {
 public:
  Sampler(const cpu::KernelTable& kernels, int vocab_size);

  /// Chooses the next token from logits[vocab], which it may overwrite.
  void sample(const SampleInput& input, float* logits, SampleResult& result);

  /// The report for `chosen` and the `top` most likely tokens of logits[vocab]: the chosen token
  /// first, then the others in descending order.
  std::vector<TokenLogprob> report(const float* logits, TokenId chosen, int top);

 private:
  struct Candidate {
    float logit;
    TokenId token;
  };

  void apply_penalties(const SampleInput& input, float* logits);
  TokenId draw(const SampleInput& input, const float* logits);
  void keep_top_k(int k);
  void keep_top_p(float top_p, float maximum, float temperature);

  const cpu::KernelTable& kernels_;
  int vocab_size_;
  std::vector<Candidate> candidates_;
  std::vector<float> raw_;            // [vocab] logits before penalties
  std::vector<std::int32_t> counts_;  // [vocab] occurrences; zero between calls
};

}  // namespace deinfer

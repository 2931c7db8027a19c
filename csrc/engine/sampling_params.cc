#include "deinfer/sampling_params.h"

#include <cmath>

#include "base/check.h"

namespace deinfer {
namespace {

// Written so that NaN fails.
void check_range(const char* name, float value, bool ok, const char* expected) {
  check_argument(ok && std::isfinite(value), name, " must be ", expected, ", got ", value);
}

}  // namespace

void SamplingParams::validate() const {
  check_argument(n >= 1 && n <= 1024, "n must be between 1 and 1024, got ", n);
  check_argument(!max_tokens || *max_tokens >= 1, "max_tokens must be at least 1, got ",
                 max_tokens.value_or(0));
  check_argument(min_tokens >= 0, "min_tokens must be at least 0, got ", min_tokens);
  check_argument(!max_tokens || min_tokens <= *max_tokens, "min_tokens=", min_tokens,
                 " exceeds max_tokens=", max_tokens.value_or(0));
  check_range("temperature", temperature, temperature >= 0, "a finite number >= 0");
  check_range("top_p", top_p, top_p > 0 && top_p <= 1, "in (0, 1]");
  check_argument(top_k >= -1, "top_k must be -1, 0 (both: all tokens) or positive, got ", top_k);
  check_range("min_p", min_p, min_p >= 0 && min_p <= 1, "in [0, 1]");
  check_range("repetition_penalty", repetition_penalty, repetition_penalty > 0,
              "a finite number > 0");
  check_range("presence_penalty", presence_penalty, presence_penalty >= -2 && presence_penalty <= 2,
              "in [-2, 2]");
  check_range("frequency_penalty", frequency_penalty,
              frequency_penalty >= -2 && frequency_penalty <= 2, "in [-2, 2]");
  check_argument(!logprobs || *logprobs >= 0, "logprobs must be at least 0, got ",
                 logprobs.value_or(0));
  check_argument(!prompt_logprobs || *prompt_logprobs >= 0,
                 "prompt_logprobs must be at least 0, got ", prompt_logprobs.value_or(0));
  if (expected_tokens) {
    check_range("expected_tokens", *expected_tokens, *expected_tokens > 0, "a finite number > 0");
  }
}

}  // namespace deinfer

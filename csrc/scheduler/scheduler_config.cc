#include "scheduler/scheduler_config.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace deinfer {

Admission parse_admission(std::string_view name) {
  if (name == "peak") return Admission::kPeak;
  if (name == "prompt") return Admission::kPrompt;
  if (name == "max_tokens") return Admission::kMaxTokens;
  fail(ErrorCode::kInvalidArgument, "admission=\"", name,
       "\" is unknown; known: peak, prompt, max_tokens");
}

void SchedulerConfig::validate() const {
  const auto at_least = [](const char* name, int value, int minimum) {
    check_argument(value >= minimum, name, " must be at least ", minimum, ", got ", value);
  };
  // Written so that NaN fails.
  const auto duration = [](const char* name, double value) {
    check_argument(value >= 0.0 && std::isfinite(value), name,
                   " must be a finite number >= 0, got ", value);
  };
  at_least("max_num_seqs", max_num_seqs, 1);
  at_least("max_num_batched_tokens", max_num_batched_tokens, 1);
  at_least("block_size", block_size, 1);
  at_least("num_blocks", num_blocks, 1);
  at_least("max_prefill_chunk", max_prefill_chunk, 0);
  check_argument(watermark >= 0.0 && watermark < 1.0, "watermark must be in [0, 1), got ",
                 watermark);
  check_argument(safety >= 0.0 && safety <= 1.0, "safety must be in [0, 1], got ", safety);
  at_least("history_window", history_window, 1);
  duration("promotion.after_s", promotion.after_s);
  duration("promotion.per_token_s", promotion.per_token_s);
  at_least("readmission_steps", readmission_steps, 0);
  at_least("max_pause", max_pause, 0);
  at_least("preempt_limit", preempt_limit, 0);
  for (std::size_t i = 0; i < graph_sizes.size(); ++i) {
    check_argument(graph_sizes[i] > (i == 0 ? 0 : graph_sizes[i - 1]),
                   "graph_sizes must be positive and ascending, got ", graph_sizes[i],
                   " at position ", i);
  }
}

}  // namespace deinfer

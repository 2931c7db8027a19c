// How the scheduler admits, preempts and orders sequences.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

namespace deinfer {

/// What a waiting sequence must find room for before it starts.
enum class Admission {
  kPeak,       // the peak of all running sequences' future KV, after their expected lengths
  kPrompt,     // its known tokens
  kMaxTokens,  // everything that it and the running ones may ever need: nobody is evicted
};

/// "peak", "prompt" or "max_tokens". Throws Error(kInvalidArgument) for another name.
Admission parse_admission(std::string_view name);

/// When a waiting sequence is put ahead of the others of its priority, in order of arrival.
struct Promotion {
  double after_s = 0.0;      // seconds of waiting; 0: never
  double per_token_s = 0.0;  // seconds of waiting per expected token; 0: never
};

struct SchedulerConfig {
  int max_num_seqs = 256;            // running sequences
  int max_num_batched_tokens = 512;  // computed tokens per step
  int block_size = 16;               // tokens per KV block
  int num_blocks = 0;                // in the pool
  int max_prefill_chunk = 0;         // tokens of one sequence per step; 0: the step's budget
  bool enable_prefix_caching = true;
  double watermark = 0.03;  // share of the blocks that admission leaves available, [0, 1)
  Admission admission = Admission::kPeak;
  double safety = 0.0;       // [0, 1]: lengths for admission between their mean and 90 % quantile
  int history_window = 512;  // ended answers whose lengths are remembered, >= 1
  Promotion promotion;
  // Tokens that each running sequence must have room to generate before a preempted one comes back;
  // with 0, they take turns at preempting each other.
  int readmission_steps = 8;
  // Steps that a running sequence without a block for its next token pauses, keeping its KV, before
  // another is evicted for it; >= 0. Answers end all the time, so most find a block.
  int max_pause = 8;
  // Evictions of a sequence, after which it never again lacks a block; 0: no limit.
  int preempt_limit = 2;
  // Sizes of batches that the backend has prepared (captured graphs), ascending; it pads others to
  // the next one. Empty: all sizes are the same to it.
  std::vector<int> graph_sizes;

  /// Sequences in a step, each of which computes at least one token.
  int num_seats() const { return std::min(max_num_seqs, max_num_batched_tokens); }

  /// Throws Error(kInvalidArgument) naming the field and its value.
  void validate() const;
};

}  // namespace deinfer

// Sampling of rows of logits, as host code launches it (kernels.h).
#pragma once

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

/// What becomes of a row of logits.
enum class SampleMode : int {
  kIdle,     // nothing
  kLargest,  // its largest token is taken
  kDraw,     // a token is drawn
  kGiven,    // a given token is reported on
};

/// How a row is sampled: SamplingParams and what follows from them (ops/sampling.h).
struct SampleRow {
  double uniform = 0.0;  // in [0, 1)
  double top_p = 1.0;
  double tail_log_share = 0.0;  // where top_p < 1
  float scale = 1.0f;           // of logits less the largest
  float min_p_drop = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  SampleMode mode = SampleMode::kIdle;
  int top_k = 0;      // less than the vocabulary; 0: all
  int has_min_p = 0;  // 1: min_p_drop counts
  int history = 0;    // place in the pool: tokens so far, then banned ones
  int prompt_tokens = 0;
  int tokens = 0;  // so far, prompt included
  int banned = 0;
  int given = 0;
  int top = -1;    // tokens that are reported, at most kMaxReported; -1: no report
  int report = 0;  // their place among those of all rows
};

/// What came of it. All but the token where a report is wanted.
struct SampledToken {
  double total = 0.0;  // sum of exp(logit - maximum)
  float maximum = 0.0f;
  float logit = 0.0f;  // of the token
  int token = 0;
  int rank = 0;  // from 1
  int top = 0;   // reported tokens: fewer than asked for where logits are NaN
};
struct ReportedToken {
  float logit = 0.0f;
  int token = 0;
};

inline constexpr int kSampleThreads = 1024;
/// Weights that are summed in single precision, by so many lanes; as on the CPU.
inline constexpr int kSumBlock = 256;
inline constexpr int kSumLanes = 16;
/// Windows that are sorted, and the logits whose median divides larger ones; as on the CPU.
inline constexpr int kSortedWindow = 64;
inline constexpr int kPivotSample = 15;
/// Beyond these, rows are the host's.
inline constexpr int kMaxReported = 128;
inline constexpr int kMaxSampledVocabulary = 2048 * kSumBlock;

/// Chooses tokens as engine/sampler.cc does from the same logits, bit for bit: whatever rounds does
/// so in the same order.
struct SampleLaunch {
  float* logits = nullptr;  // [rows, vocabulary]; penalties change them
  int rows = 0;
  int vocabulary = 0;
  const SampleRow* samples = nullptr;  // [rows]
  const int* pool = nullptr;
  float* saved = nullptr;            // as many as in the pool; scratch
  int* lists = nullptr;              // [rows, 3, vocabulary]; scratch
  int* counts = nullptr;             // [rows, vocabulary], zero before and after
  SampledToken* out = nullptr;       // [rows]
  ReportedToken* reports = nullptr;  // of all rows
};
int launch_sample(const SampleLaunch& args, Stream stream);

}  // namespace deinfer::cuda

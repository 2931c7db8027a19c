// A submitted request and its samples, between submit() and its last output.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "deinfer/engine.h"
#include "engine/sampler.h"
#include "ops/sampling.h"
#include "scheduler/sequence.h"

namespace deinfer {

/// Limits that requests are checked against.
struct RequestLimits {
  int vocab_size = 0;
  int max_model_len = 0;
  int block_size = 0;
  std::int64_t num_kv_blocks = 0;
  int num_state_layers = 0;  // whose hidden states may be asked for
};

/// Throws Error(kInvalidArgument or kOutOfMemory) naming the operand and its value.
void check_request(std::span<const TokenId> prompt, const SamplingParams& params,
                   const RequestLimits& limits);

class Request {
 public:
  /// `eos_token_ids` are the model's; `seed` replaces a missing one.
  Request(RequestId id, std::span<const TokenId> prompt, const SamplingParams& params,
          const std::vector<TokenId>& eos_token_ids, std::uint64_t seed, int max_model_len,
          const LengthDistribution& belief = {});

  RequestId id() const { return id_; }
  const SamplingParams& params() const { return params_; }
  int prompt_length() const { return static_cast<int>(prompt_.size()); }
  int num_samples() const { return params_.n; }

  /// The sequence of one sample, for the scheduler.
  Sequence make_sequence(int index, SequenceId id, std::int64_t now_us) const;

  /// True while the prompt's own log-probabilities or logits are still to be computed; only sample
  /// 0 computes them.
  bool wants_prompt_rows(int index) const {
    return index == 0 && !prompt_reported_ &&
           (params_.prompt_logprobs.has_value() || params_.prompt_logits);
  }
  /// Makes room for the rows; call it before the first take_prompt_row().
  void prepare_prompt_rows(int vocab_size);
  /// Whether the logits of a position of the prompt matter to what was asked of it.
  bool wants_prompt_row(int position) const {
    return position < (params_.prompt_logits ? prompt_length() : prompt_length() - 1);
  }
  /// The report on the token after a prompt position, for a worker that makes it of row `row`.
  SampledRow reported_row(int row, int position) const;
  void take_prompt_report(int position, std::vector<TokenLogprob> report);
  /// Takes logits[vocab] of a prompt position. Different positions may come from different threads.
  void take_prompt_row(int position, const float* logits, int vocab_size, Sampler& sampler);

  /// Whether the sample's next token is the most likely one and nothing else is asked of the
  /// logits.
  bool takes_most_likely(const Sequence& sequence) const;
  SampleInput sample_input(const Sequence& sequence, int index) const;
  /// The same for a worker that samples row `row` of its batch.
  SampledRow sampled_row(int row, const Sequence& sequence, int index) const;

  /// Why a sample that has just generated `token` as its `count`th token ends, if it does.
  FinishReason finish_reason(TokenId token, int count) const;

  /// Moves the prompt's report into `output` once its last row has been computed.
  void report_prompt(RequestOutput& output);

  // Per sample; kept by the engine.
  struct Sample {
    SequenceId sequence = 0;
    int num_reported = 0;  // generated tokens; a policy may have a sample generate them again
    bool ended = false;
    bool aborted = false;             // but not ended yet: nothing more is reported of it
    std::vector<float> state_sum;     // [layers, hidden] of the rows that sampled; see HiddenStates
    std::vector<float> length_prior;  // what the length head keeps between its stages
  };
  std::vector<Sample> samples;
  int num_ended = 0;

 private:
  RequestId id_;
  std::vector<TokenId> prompt_;
  SamplingParams params_;
  std::vector<TokenId> stop_ids_;  // eos (unless ignored) and stop_token_ids
  std::uint64_t seed_;
  int max_new_tokens_;
  LengthDistribution belief_;
  bool prompt_reported_ = false;
  std::vector<std::vector<TokenLogprob>> prompt_logprobs_;
  std::vector<float> prompt_logits_;
};

}  // namespace deinfer

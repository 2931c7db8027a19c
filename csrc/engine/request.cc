#include "engine/request.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {

void check_request(std::span<const TokenId> prompt, const SamplingParams& params,
                   const RequestLimits& limits) {
  params.validate();
  check_argument(!prompt.empty(), "prompt is empty: it needs at least one token");
  auto length = static_cast<std::int64_t>(prompt.size());
  check_argument(length < limits.max_model_len, "prompt has ", length,
                 " tokens; max_model_len=", limits.max_model_len,
                 " must exceed that by at least one");
  auto check_token = [&](const char* what, TokenId token) {
    check_argument(token >= 0 && token < limits.vocab_size, what, " ", token,
                   " is outside the vocabulary [0, ", limits.vocab_size, ")");
  };
  for (TokenId token : prompt) check_token("prompt token id", token);
  for (TokenId token : params.stop_token_ids) check_token("stop token id", token);
  check_argument(!params.hidden_states || limits.num_state_layers > 0,
                 "hidden_states=", params.hidden_states.value_or(0),
                 " needs an engine with hidden_state_layers");
  std::int64_t most = limits.max_model_len;
  if (params.max_tokens) most = std::min(most, length + *params.max_tokens);
  std::int64_t blocks = (most + limits.block_size - 1) / limits.block_size;
  if (blocks > limits.num_kv_blocks) {
    fail(ErrorCode::kOutOfMemory, "a request of up to ", most, " tokens needs ", blocks,
         " KV blocks of ", limits.block_size, " tokens; the pool has ", limits.num_kv_blocks);
  }
}

Request::Request(RequestId id, std::span<const TokenId> prompt, const SamplingParams& params,
                 const std::vector<TokenId>& eos_token_ids, std::uint64_t seed, int max_model_len,
                 const LengthDistribution& belief)
    : samples(static_cast<std::size_t>(params.n)),
      id_(id),
      prompt_(prompt.begin(), prompt.end()),
      params_(params),
      stop_ids_(params.stop_token_ids),
      seed_(params.seed.value_or(seed)),
      belief_(belief) {
  if (!params.ignore_eos) {
    stop_ids_.insert(stop_ids_.end(), eos_token_ids.begin(), eos_token_ids.end());
  }
  int room = max_model_len - prompt_length();
  max_new_tokens_ = params.max_tokens ? std::min(*params.max_tokens, room) : room;
}

Sequence Request::make_sequence(int index, SequenceId id, std::int64_t now_us) const {
  Sequence sequence;
  sequence.id = id;
  sequence.arrival = id_;
  sequence.arrival_us = now_us;
  sequence.priority = params_.priority;
  sequence.tokens = prompt_;
  sequence.prompt_length = prompt_length();
  sequence.max_new_tokens = max_new_tokens_;
  sequence.expected_length = belief_;
  if (params_.expected_tokens) {
    sequence.hinted = true;
    sequence.expected_length = LengthDistribution::point(*params_.expected_tokens);
  }
  sequence.reuse_prefix = !wants_prompt_rows(index);
  return sequence;
}

void Request::take_prompt_row(int position, const float* logits, int vocab_size, Sampler& sampler) {
  auto row = static_cast<std::size_t>(position);
  auto width = static_cast<std::size_t>(vocab_size);
  if (params_.prompt_logits) {
    std::copy_n(logits, width, prompt_logits_.begin() + static_cast<std::ptrdiff_t>(row * width));
  }
  if (params_.prompt_logprobs && row + 1 < prompt_.size()) {
    prompt_logprobs_[row] = sampler.report(logits, prompt_[row + 1], *params_.prompt_logprobs);
  }
}

SampledRow Request::reported_row(int row, int position) const {
  SampledRow sampled;
  sampled.row = row;
  sampled.params = &params_;
  const auto next = static_cast<std::size_t>(position) + 1;
  if (next < prompt_.size()) sampled.given = prompt_[next];
  sampled.top = params_.prompt_logprobs.value_or(-1);
  return sampled;
}

void Request::take_prompt_report(int position, std::vector<TokenLogprob> report) {
  prompt_logprobs_[static_cast<std::size_t>(position)] = std::move(report);
}

void Request::prepare_prompt_rows(int vocab_size) {
  if (params_.prompt_logprobs) prompt_logprobs_.resize(prompt_.size() - 1);
  if (params_.prompt_logits) {
    prompt_logits_.resize(prompt_.size() * static_cast<std::size_t>(vocab_size));
  }
}

bool Request::takes_most_likely(const Sequence& sequence) const {
  return params_.temperature == 0.0f && !params_.logprobs && !has_penalties(params_) &&
         sequence.num_generated() >= params_.min_tokens;
}

SampleInput Request::sample_input(const Sequence& sequence, int index) const {
  SampleInput input;
  input.params = &params_;
  input.tokens = sequence.tokens;
  input.prompt_length = prompt_length();
  input.seed = seed_;
  input.index = index;
  if (sequence.num_generated() < params_.min_tokens) input.banned = stop_ids_;
  return input;
}

SampledRow Request::sampled_row(int row, const Sequence& sequence, int index) const {
  const SampleInput input = sample_input(sequence, index);
  const int step = static_cast<int>(input.tokens.size()) - input.prompt_length;
  return {row,          input.params,
          input.tokens, input.prompt_length,
          input.banned, uniform_at(input.seed, input.index, step),
          -1,           params_.logprobs.value_or(-1)};
}

FinishReason Request::finish_reason(TokenId token, int count) const {
  if (std::find(stop_ids_.begin(), stop_ids_.end(), token) != stop_ids_.end()) {
    return FinishReason::kStop;
  }
  return count >= max_new_tokens_ ? FinishReason::kLength : FinishReason::kNone;
}

void Request::report_prompt(RequestOutput& output) {
  prompt_reported_ = true;
  output.prompt_length = prompt_length();
  output.prompt_logprobs = std::move(prompt_logprobs_);
  output.prompt_logits = std::move(prompt_logits_);
}

}  // namespace deinfer

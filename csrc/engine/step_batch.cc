#include "engine/step_batch.h"

namespace deinfer {

void StepBatch::build(const ScheduledBatch& scheduled, const SequenceOwners& owners,
                      const HiddenStates& hidden_states, SamplingRoom room) {
  batch_.clear();
  targets_.clear();
  sampled_targets_.clear();
  argmax_results_.clear();
  // The worker samples the row, or the consumer of its logits does.
  const bool worker_samples = room.most_reported >= 0;
  auto want_row = [&](int row, const Target& target, bool needs_logits, auto&& sampled) {
    if (worker_samples && !needs_logits) {
      const SampledRow own = sampled();
      if (room.take(own)) {
        batch_.sampled.push_back(own);
        sampled_targets_.push_back(target);
        return;
      }
    }
    batch_.logit_rows.push_back(row);
    targets_.push_back(target);
  };
  int num_results = 0;
  for (const ScheduledSequence& item : scheduled.items) {
    const Sequence& sequence = *item.sequence;
    auto [request, index] = owners.at(sequence.id);
    int first = sequence.num_computed;
    int first_row = batch_.num_tokens();
    batch_.sequences.push_back({first_row, item.num_tokens, first, sequence.block_table.data()});
    bool prompt_rows = request->wants_prompt_rows(index);
    for (int i = 0; i < item.num_tokens; ++i) {
      int position = first + i;
      batch_.token_ids.push_back(sequence.tokens[static_cast<std::size_t>(position)]);
      batch_.positions.push_back(position);
      batch_.slots.push_back(
          {sequence.block_table[static_cast<std::size_t>(position / block_size_)],
           position % block_size_});
      if (prompt_rows && request->wants_prompt_row(position)) {
        want_row(first_row + i, {request, &sequence, index, position, -1},
                 request->params().prompt_logits,
                 [&] { return request->reported_row(first_row + i, position); });
      }
    }
    if (!item.samples) continue;
    int last_row = first_row + item.num_tokens - 1;
    if (hidden_states.wants(*request)) batch_.state_rows.push_back(last_row);
    if (request->takes_most_likely(sequence)) {
      batch_.argmax_rows.push_back(last_row);
      argmax_results_.push_back(num_results++);
    } else {
      want_row(last_row, {request, &sequence, index, -1, num_results++}, false,
               [&] { return request->sampled_row(last_row, sequence, index); });
    }
  }
  if (static_cast<int>(results_.size()) < num_results) {
    results_.resize(static_cast<std::size_t>(num_results));
  }
}

void StepBatch::take_logits(TeamMember& member, int first, int count, float* logits) {
  Sampler& sampler = samplers_[static_cast<std::size_t>(member.id())];
  auto [begin, end] = member.share(count);
  for (int i = begin; i < end; ++i) {
    const Target& target = targets_[static_cast<std::size_t>(first + i)];
    float* row = logits + static_cast<std::ptrdiff_t>(i) * vocab_size_;
    if (target.prompt_position >= 0) {
      target.request->take_prompt_row(target.prompt_position, row, vocab_size_, sampler);
    } else {
      sampler.sample(target.request->sample_input(*target.sequence, target.index), row,
                     results_[static_cast<std::size_t>(target.result)]);
    }
  }
}

void StepBatch::take_sampled(std::span<SampleResult> rows) {
  for (std::size_t i = 0; i < sampled_targets_.size(); ++i) {
    const Target& target = sampled_targets_[i];
    if (target.prompt_position >= 0) {
      target.request->take_prompt_report(target.prompt_position, std::move(rows[i].logprobs));
    } else {
      results_[static_cast<std::size_t>(target.result)] = std::move(rows[i]);
    }
  }
}

void StepBatch::take_most_likely(std::span<const TokenId> tokens) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    results_[static_cast<std::size_t>(argmax_results_[i])] = {tokens[i], {}};
  }
}

}  // namespace deinfer

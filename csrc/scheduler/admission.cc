#include "scheduler/admission.h"

#include <algorithm>
#include <cmath>

namespace deinfer {

AdmissionController::AdmissionController(const SchedulerConfig& config, const BlockManager& blocks)
    : config_(config),
      blocks_(blocks),
      history_(config.history_window),
      forecast_(config.block_size) {}

int AdmissionController::at_least_two_blocks(float tokens) const {
  return std::max(static_cast<int>(std::lround(tokens)), 2 * config_.block_size);
}

float AdmissionController::expected_remaining(const Sequence& sequence) const {
  if (!sequence.expected_length.known()) return 0.0f;
  const int generated = sequence.num_generated();
  float tokens = sequence.expected_length.mean_remaining(generated);
  if (tokens <= 0.0f) {
    tokens = static_cast<float>(at_least_two_blocks(history_.mean_remaining(generated)));
  }
  return std::clamp(tokens, 1.0f, static_cast<float>(sequence.max_new_tokens - generated));
}

int AdmissionController::remaining(const Sequence& sequence) const {
  const int generated = sequence.num_generated();
  const LengthDistribution& own = sequence.expected_length;
  const double safety = config_.safety;
  double tokens = 0.0;
  if (own.known()) {
    tokens = own.quantile_remaining(LengthHistory::stratum(sequence.id), generated);
    if (safety > 0.0) {
      tokens += safety * std::max(0.0, own.quantile_remaining(0.9, generated) - tokens);
    }
    if (tokens <= 0.0) tokens = at_least_two_blocks(history_.mean_remaining(generated));
  } else if (history_.known()) {
    tokens = history_.quantile_remaining(LengthHistory::stratum(sequence.id), generated);
    if (safety > 0.0) {
      tokens += safety * std::max(0.0, history_.quantile_remaining(0.9, generated) - tokens);
    }
  } else {
    return 0;
  }
  const double most = sequence.max_new_tokens - generated;
  return static_cast<int>(std::clamp(std::round(tokens), 1.0, most));
}

void AdmissionController::note_belief(Sequence& sequence) const {
  const LengthDistribution& own = sequence.expected_length;
  const auto most = static_cast<float>(sequence.max_new_tokens);
  const float mean = own.known() ? own.mean() : history_.mean();
  const float q90 =
      own.known() ? own.quantile_remaining(0.9, 0) : history_.quantile_remaining(0.9, 0);
  sequence.admission_mean = std::min(mean, most);
  sequence.admission_q90 = std::min(q90, most);
}

void AdmissionController::begin(std::span<Sequence* const> running) {
  running_ = running;
  forecast_done_ = false;
  whole_blocks_ = -1;
  history_.refresh(running);
}

bool AdmissionController::has_room(const Sequence& candidate,
                                   const BlockManager::PrefixMatch& match) {
  if (running_.empty()) return true;  // alone, every sequence that was accepted fits
  if (!pinned_fit(candidate)) return false;
  if (static_cast<int>(running_.size()) >= config_.num_seats()) return whole_answers_fit(candidate);
  switch (config_.admission) {
    case Admission::kPrompt: return true;
    case Admission::kMaxTokens: return reservations_fit(candidate);
    case Admission::kPeak: return peak_fits(candidate, match);
  }
  return true;
}

void AdmissionController::admitted(std::span<Sequence* const> running) {
  running_ = running;
  if (whole_blocks_ >= 0) whole_blocks_ += whole_blocks(*running.back());
  if (!forecast_done_) return;
  if (candidate_.owner != running.back()->id) {
    forecast_done_ = false;  // admitted without a look ahead
    return;
  }
  forecast_.insert(candidate_);
  pending_ += running.back()->num_pending();
}

std::int64_t AdmissionController::whole_blocks(const Sequence& sequence) const {
  const int left = remaining(sequence);
  if (left == 0) return most_blocks(sequence);
  return blocks_.blocks_for(std::int64_t{sequence.length()} + left);
}

bool AdmissionController::whole_answers_fit(const Sequence& candidate) {
  if (config_.admission == Admission::kMaxTokens) return reservations_fit(candidate);
  if (whole_blocks_ < 0) {
    whole_blocks_ = 0;
    for (const Sequence* sequence : running_) whole_blocks_ += whole_blocks(*sequence);
  }
  const auto total = static_cast<double>(whole_blocks_ + whole_blocks(candidate));
  return total <= config_.num_blocks * (1.0 - config_.watermark);
}

bool AdmissionController::reservations_fit(const Sequence& candidate) const {
  std::int64_t total = most_blocks(candidate);
  for (const Sequence* sequence : running_) total += most_blocks(*sequence);
  return total <= config_.num_blocks;
}

bool AdmissionController::pinned_fit(const Sequence& candidate) const {
  // When blocks run out, victims are found until only pinned sequences and one other are left; so
  // if these always fit, no pinned one is ever a victim.
  std::int64_t total = 0;
  std::int64_t largest = 0;
  bool any = false;
  const auto count = [&](const Sequence& sequence) {
    if (pinned(sequence)) {
      any = true;
      total += most_blocks(sequence);
    } else {
      largest = std::max(largest, most_blocks(sequence));
    }
  };
  count(candidate);
  for (const Sequence* sequence : running_) count(*sequence);
  return !any || total + largest <= config_.num_blocks;
}

int AdmissionController::shared_blocks(const Sequence& sequence) const {
  const auto shared = [&](std::int32_t block) { return blocks_.reference_count(block) > 1; };
  const std::vector<std::int32_t>& table = sequence.block_table;
  if (sequence.computed_twice) return static_cast<int>(std::ranges::count_if(table, shared));
  // Whoever holds a block of a shared prefix holds those before it, so counts never rise.
  return static_cast<int>(std::ranges::partition_point(table, shared) - table.begin());
}

KvForecast::Item AdmissionController::item(const Sequence& sequence, std::int64_t pending,
                                           int shared) const {
  int steps = std::max(remaining(sequence), 1) - 1;  // the last token's KV is never written
  int tokens = sequence.length();
  if (sequence.num_pending() > 1) {
    // It grows only once its prompt is computed, and those before it.
    int chunk = config_.max_num_batched_tokens - static_cast<int>(running_.size());
    if (config_.max_prefill_chunk > 0) chunk = std::min(chunk, config_.max_prefill_chunk);
    const auto delay = static_cast<int>((pending - 1) / std::max(1, chunk));
    steps += delay;
    tokens = std::max(0, tokens - delay);
  }
  return {sequence.id, steps, tokens, shared};
}

void AdmissionController::forecast_running() {
  forecast_done_ = true;
  pending_ = 0;
  std::int64_t own = 0;  // blocks that only one sequence holds
  forecast_.clear();
  for (const Sequence* sequence : running_) {
    const int shared = shared_blocks(*sequence);
    own += static_cast<std::int64_t>(sequence->block_table.size()) - shared;
    if (sequence->num_pending() > 1) pending_ += sequence->num_pending();
    forecast_.add(item(*sequence, pending_, shared));
  }
  forecast_.set_shared_blocks(blocks_.num_used() - own);
  forecast_.sort();
}

int AdmissionController::lend_prefix(const BlockManager::PrefixMatch& match) {
  lent_.clear();
  int held = 0;
  const Sequence* holder = nullptr;
  for (std::size_t i = match.blocks.size(); i-- > 0;) {
    const std::int32_t block = match.blocks[i];
    const int holders = blocks_.reference_count(block);
    if (holders > 0) ++held;
    if (holders != 1) continue;
    const auto holds = [&](const Sequence* sequence) {
      return sequence->block_table.size() > i && sequence->block_table[i] == block;
    };
    if (holder == nullptr || !holds(holder)) {  // mostly one sequence holds them all
      holder = *std::ranges::find_if(running_, holds);
      lent_.emplace_back(holder->id, 0);
    }
    ++lent_.back().second;
  }
  for (const auto& [owner, blocks] : lent_) forecast_.share(owner, blocks);
  return held;
}

bool AdmissionController::peak_fits(const Sequence& candidate,
                                    const BlockManager::PrefixMatch& match) {
  if (!history_.known() && !candidate.expected_length.known()) return true;
  if (!forecast_done_) forecast_running();
  const int held = lend_prefix(match);
  const std::int64_t matched = static_cast<std::int64_t>(match.blocks.size()) * config_.block_size;
  candidate_ = item(candidate, pending_ + candidate.length() - matched, held);
  const std::int64_t peak = forecast_.peak_with(candidate_);
  double limit = config_.num_blocks;
  if (!graph_pads_a_seat()) limit *= 1.0 - config_.watermark;
  if (static_cast<double>(peak) > limit) {
    for (const auto& [holder, blocks] : lent_) forecast_.share(holder, -blocks);
    return false;
  }
  forecast_blocks_ = peak;
  return true;
}

bool AdmissionController::graph_pads_a_seat() const {
  // The backend computes the next size anyway: the seat costs nothing, so it needs no watermark.
  const std::vector<int>& sizes = config_.graph_sizes;
  const int running = static_cast<int>(running_.size());
  return !sizes.empty() && running < sizes.back() && !std::ranges::binary_search(sizes, running);
}

}  // namespace deinfer

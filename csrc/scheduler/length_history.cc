#include "scheduler/length_history.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {
namespace {

/// Fewer ends say too little.
constexpr std::size_t kMinEnded = 16;

}  // namespace

LengthHistory::LengthHistory(int window) : window_(static_cast<std::size_t>(window)) {
  check_argument(window >= 1, "length history: the window must be at least 1, got ", window);
  recent_.reserve(window_);
  sorted_.reserve(window_);
}

void LengthHistory::add(int length, bool ended) {
  if (length < 1) return;  // aborted before its first token
  const Entry entry{length, !ended};
  if (recent_.size() < window_) {
    recent_.push_back(entry);
  } else {
    const Entry gone = recent_[oldest_];
    recent_[oldest_] = entry;
    oldest_ = (oldest_ + 1) % window_;
    sorted_.erase(std::ranges::lower_bound(sorted_, gone));
    if (!gone.cut) --num_ended_;
  }
  sorted_.insert(std::ranges::upper_bound(sorted_, entry), entry);
  if (ended) ++num_ended_;
  changed_ = true;
}

void LengthHistory::refresh(std::span<Sequence* const> running) {
  if (!changed_) return;
  changed_ = false;
  known_ = num_ended_ >= std::min(kMinEnded, window_);
  length_.clear();
  if (!known_) return;
  observed_ = sorted_;
  if (recent_.size() < window_) {
    for (const Sequence* sequence : running) {
      if (sequence->num_generated() > 0) observed_.push_back({sequence->num_generated(), true});
    }
    std::ranges::sort(observed_);
  }
  double exposure = 0.0;  // tokens that were generated
  for (const Entry& entry : observed_) exposure += entry.length;
  tail_ = static_cast<float>(exposure / static_cast<double>(num_ended_));

  mass_beyond_.clear();  // holds each length's own mass for now
  double survival = 1.0;
  for (std::size_t i = 0; i < observed_.size(); ++i) {
    if (observed_[i].cut) continue;
    const double mass = survival / static_cast<double>(observed_.size() - i);
    survival -= mass;
    const auto length = static_cast<float>(observed_[i].length);
    if (!length_.empty() && length_.back() == length) {
      mass_beyond_.back() += mass;
    } else {
      length_.push_back(length);
      mass_beyond_.push_back(mass);
    }
  }
  if (observed_.back().cut) {
    length_.push_back(static_cast<float>(observed_.back().length) + tail_);
    mass_beyond_.push_back(survival);
  }
  moment_beyond_.resize(length_.size());
  double mass = 0.0;
  double moment = 0.0;
  for (std::size_t i = length_.size(); i-- > 0;) {
    moment += mass_beyond_[i] * length_[i];
    mass += mass_beyond_[i];
    mass_beyond_[i] = mass;
    moment_beyond_[i] = moment;
  }
}

std::size_t LengthHistory::first_beyond(int generated) const {
  const auto first = std::ranges::upper_bound(length_, static_cast<float>(generated));
  return static_cast<std::size_t>(first - length_.begin());
}

float LengthHistory::mean_remaining(int generated) const {
  if (!known_) return 0.0f;
  const std::size_t first = first_beyond(generated);
  if (first == length_.size()) return tail_;
  return static_cast<float>(moment_beyond_[first] / mass_beyond_[first] - generated);
}

float LengthHistory::quantile_remaining(double q, int generated) const {
  if (!known_) return 0.0f;
  const std::size_t first = first_beyond(generated);
  if (first == length_.size()) return tail_;
  // The longest length that at least 1 - q of the mass reaches.
  const double reach = (1.0 - q) * mass_beyond_[first];
  const auto begin = mass_beyond_.begin() + static_cast<std::ptrdiff_t>(first);
  const auto end =
      std::partition_point(begin, mass_beyond_.end(), [&](double mass) { return mass > reach; });
  const std::ptrdiff_t index =
      std::max<std::ptrdiff_t>(end - mass_beyond_.begin() - 1, static_cast<std::ptrdiff_t>(first));
  return length_[static_cast<std::size_t>(index)] - static_cast<float>(generated);
}

}  // namespace deinfer

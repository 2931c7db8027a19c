#include "scheduler/length_distribution.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace deinfer {

LengthDistribution::LengthDistribution(std::span<const float> lengths,
                                       std::span<const float> probabilities) {
  if (lengths.size() != probabilities.size() || lengths.empty() || lengths.size() > kMaxBins) {
    fail(ErrorCode::kInvalidArgument, "length distribution: ", lengths.size(), " lengths and ",
         probabilities.size(), " probabilities; 1 to ", kMaxBins, " of each are needed");
  }
  double sum = 0.0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (!std::isfinite(lengths[i]) || !std::isfinite(probabilities[i]) || probabilities[i] < 0.0f) {
      return;
    }
    sum += probabilities[i];
  }
  if (sum <= 0.0) return;
  if (std::abs(sum - 1.0) < 1e-5) sum = 1.0;  // a distribution already: to the last bit as it is
  std::array<std::size_t, kMaxBins> order{};
  auto end = order.begin() + static_cast<std::ptrdiff_t>(lengths.size());
  std::iota(order.begin(), end, std::size_t{0});
  std::stable_sort(order.begin(), end,
                   [&](std::size_t a, std::size_t b) { return lengths[a] < lengths[b]; });
  num_bins_ = static_cast<int>(lengths.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    length_[i] = std::max(lengths[order[i]], 1.0f);
    probability_[i] = static_cast<float>(probabilities[order[i]] / sum);
  }
}

LengthDistribution LengthDistribution::point(float length) {
  LengthDistribution result;
  if (!std::isfinite(length) || length <= 0.0f) return result;
  result.num_bins_ = 1;
  result.length_[0] = std::max(length, 1.0f);
  result.probability_[0] = 1.0f;
  return result;
}

std::size_t LengthDistribution::first_beyond(int generated, double& mass) const {
  std::size_t first = 0;
  while (first < bins() && length_[first] <= static_cast<float>(generated)) ++first;
  mass = 0.0;
  for (std::size_t i = first; i < bins(); ++i) mass += probability_[i];
  return first;
}

float LengthDistribution::mean_remaining(int generated) const {
  double mass = 0.0;
  double sum = 0.0;
  for (std::size_t i = first_beyond(generated, mass); i < bins(); ++i) {
    sum += static_cast<double>(probability_[i]) * length_[i];
  }
  return mass > 0.0 ? static_cast<float>(sum / mass - generated) : 0.0f;
}

float LengthDistribution::upper_remaining(int generated, float deviations) const {
  double mass = 0.0;
  double sum = 0.0;
  double squares = 0.0;
  for (std::size_t i = first_beyond(generated, mass); i < bins(); ++i) {
    sum += static_cast<double>(probability_[i]) * std::sqrt(static_cast<double>(length_[i]));
    squares += static_cast<double>(probability_[i]) * length_[i];
  }
  if (mass <= 0.0) return 0.0f;
  const double mean = sum / mass;
  const double variance = std::max(0.0, squares / mass - mean * mean);
  const double upper = mean + deviations * std::sqrt(variance);
  return static_cast<float>(upper * upper - generated);
}

float LengthDistribution::quantile_remaining(double q, int generated) const {
  double mass = 0.0;
  std::size_t i = first_beyond(generated, mass);
  if (mass <= 0.0) return 0.0f;
  double below = 0.0;
  float length = 0.0f;
  for (; i < bins(); ++i) {
    if (probability_[i] == 0.0f) continue;
    length = length_[i];
    below += probability_[i];
    if (below >= q * mass) break;
  }
  return length - static_cast<float>(generated);
}

}  // namespace deinfer

// What is believed about the number of tokens that a sequence will generate.
#pragma once

#include <array>
#include <span>

namespace deinfer {

/// A distribution over at most kMaxBins lengths: bin i has the probability that a sequence
/// generates about length[i] tokens in all, which is the mean of the bin. Beliefs are advisory: a
/// bad one may cost time, never correctness.
class LengthDistribution {
 public:
  static constexpr int kMaxBins = 16;

  /// Unknown.
  LengthDistribution() = default;
  /// `lengths` [n] in tokens, `probabilities` [n] in any scale, 1 <= n <= kMaxBins. Whatever a
  /// predictor may say is taken: unless all lengths and probabilities are finite, the latter are
  /// not negative and some are positive, the result is unknown. Lengths below one token are one.
  LengthDistribution(std::span<const float> lengths, std::span<const float> probabilities);
  /// Certainty, or unknown for a length that is not finite or not positive.
  static LengthDistribution point(float length);

  bool known() const { return num_bins_ > 0; }
  int num_bins() const { return num_bins_; }
  /// Ascending.
  std::span<const float> lengths() const { return {length_.data(), bins()}; }
  /// They sum to 1.
  std::span<const float> probabilities() const { return {probability_.data(), bins()}; }

  /// E[length]; 0 when unknown.
  float mean() const { return mean_remaining(0); }
  /// E[length - generated | length > generated], in tokens; 0 when unknown, or when the sequence
  /// has overrun every bin.
  float mean_remaining(int generated) const;
  /// So many standard deviations above the mean of what may remain, taken of square roots of the
  /// length (a length's spread grows with it), in tokens; 0 as above.
  float upper_remaining(int generated, float deviations) const;
  /// The least number of tokens beyond `generated` within which the sequence ends with probability
  /// q in [0, 1], given that it has not ended yet; 0 as above.
  float quantile_remaining(double q, int generated) const;

 private:
  std::size_t bins() const { return static_cast<std::size_t>(num_bins_); }
  /// First bin beyond `generated`, and the probability of it and those after it.
  std::size_t first_beyond(int generated, double& mass) const;

  int num_bins_ = 0;
  std::array<float, kMaxBins> length_{};
  std::array<float, kMaxBins> probability_{};
};

}  // namespace deinfer

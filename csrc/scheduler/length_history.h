// What the lengths of earlier answers say about those to come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/sequence.h"

namespace deinfer {

/// The lengths of the last answers, as a distribution. Answers that were cut off (by their limit or
/// an abort) count as what they are: at least that long. The estimate is Kaplan and Meier's; beyond
/// the longest length it assumes a constant rate of endings. While the window fills, the running
/// sequences count as cut off, too: the first answers to end are the short ones.
class LengthHistory {
 public:
  /// `window`: lengths that are remembered, >= 1.
  explicit LengthHistory(int window);

  /// An answer of `length` tokens; `ended`: by itself, not cut off.
  void add(int length, bool ended);
  /// Takes what was added into the estimate. `running`: sequences that have not ended.
  void refresh(std::span<Sequence* const> running);

  /// Enough answers have ended to say something; else all estimates are 0.
  bool known() const { return known_; }
  /// E[length].
  float mean() const { return mean_remaining(0); }
  /// E[length - generated | length > generated], in tokens.
  float mean_remaining(int generated) const;
  /// The least number of tokens beyond `generated` within which an answer ends with probability
  /// q in [0, 1], given that it has not ended yet.
  float quantile_remaining(double q, int generated) const;

  /// A number in [0, 1) for each sequence, spread evenly over neighbouring ids: each then stands
  /// for another part of the distribution, and many together for all of it.
  static double stratum(SequenceId id) {
    return static_cast<double>((id * 0x9e3779b97f4a7c15u) >> 11) * 0x1p-53;
  }

 private:
  /// Value order is by length; of equal ones, ends come before cuts.
  struct Entry {
    int length = 0;
    bool cut = false;
    auto operator<=>(const Entry&) const = default;
  };

  std::size_t first_beyond(int generated) const;

  std::size_t window_;
  std::vector<Entry> recent_;  // a ring
  std::size_t oldest_ = 0;
  std::vector<Entry> sorted_;  // the same entries in order
  std::size_t num_ended_ = 0;
  bool changed_ = false;
  bool known_ = false;

  // The estimate: lengths with probability, ascending; the last stands for all that is longer.
  std::vector<Entry> observed_;
  std::vector<float> length_;
  std::vector<double> mass_beyond_;    // [i]: of length_[i] and longer
  std::vector<double> moment_beyond_;  // [i]: sum of probability x length of those
  float tail_ = 0.0f;                  // mean of what is left beyond the longest length
};

}  // namespace deinfer

// How well lengths were foretold: over the last sequences, what was believed when each was admitted
// against what came.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "deinfer/length_accuracy.h"

namespace deinfer {

class AccuracyWindow {
 public:
  static constexpr std::size_t kWindow = 512;

  /// All in tokens.
  void add(float predicted, float q90, int real);
  /// Sequences that were ever added.
  std::int64_t total() const { return total_; }
  /// O(window^2): for reports, not for every step.
  LengthAccuracy report() const;

 private:
  struct Outcome {
    float predicted = 0.0f;
    float q90 = 0.0f;
    float real = 0.0f;
  };

  std::vector<Outcome> outcomes_;  // a ring
  std::int64_t total_ = 0;
};

}  // namespace deinfer

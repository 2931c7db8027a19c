#include "scheduler/accuracy_window.h"

#include <cmath>

namespace deinfer {

void AccuracyWindow::add(float predicted, float q90, int real) {
  const Outcome outcome{predicted, q90, static_cast<float>(real)};
  if (outcomes_.size() < kWindow) {
    outcomes_.push_back(outcome);
  } else {
    outcomes_[static_cast<std::size_t>(total_) % kWindow] = outcome;
  }
  ++total_;
}

LengthAccuracy AccuracyWindow::report() const {
  LengthAccuracy result;
  result.count = static_cast<int>(outcomes_.size());
  if (outcomes_.empty()) return result;
  std::int64_t concordance = 0;
  std::int64_t predicted_pairs = 0;  // that differ in what was predicted
  std::int64_t real_pairs = 0;
  const auto sign = [](float x) { return (x > 0.0f) - (x < 0.0f); };
  for (std::size_t i = 0; i < outcomes_.size(); ++i) {
    const Outcome& a = outcomes_[i];
    const double error = std::abs(a.predicted - a.real);
    result.mae += error;
    result.acc_50 += error <= 50.0 ? 1.0 : 0.0;
    result.acc_100 += error <= 100.0 ? 1.0 : 0.0;
    result.q90_coverage += a.real <= a.q90 ? 1.0 : 0.0;
    for (std::size_t j = 0; j < i; ++j) {
      const int predicted = sign(a.predicted - outcomes_[j].predicted);
      const int real = sign(a.real - outcomes_[j].real);
      concordance += predicted * real;
      predicted_pairs += predicted != 0 ? 1 : 0;
      real_pairs += real != 0 ? 1 : 0;
    }
  }
  const double n = result.count;
  result.mae /= n;
  result.acc_50 /= n;
  result.acc_100 /= n;
  result.q90_coverage /= n;
  const double pairs =
      std::sqrt(static_cast<double>(predicted_pairs)) * std::sqrt(static_cast<double>(real_pairs));
  if (pairs > 0.0) result.kendall_tau = static_cast<double>(concordance) / pairs;
  return result;
}

}  // namespace deinfer

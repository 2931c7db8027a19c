// How well the lengths of answers were foretold.
#pragma once

namespace deinfer {

/// Over the last answers: what was believed of each when it was admitted against what came.
struct LengthAccuracy {
  int count = 0;              // answers in the window; with none, all below is 0
  double mae = 0.0;           // mean |predicted - real|, tokens
  double acc_50 = 0.0;        // share within 50 tokens
  double acc_100 = 0.0;       // share within 100 tokens
  double kendall_tau = 0.0;   // tau-b of predicted and real; 0 where all are the same
  double q90_coverage = 0.0;  // share of real lengths within the predicted 90 % quantile
};

}  // namespace deinfer

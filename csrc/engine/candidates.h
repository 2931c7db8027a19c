// The tokens of one row of logits that truncation leaves, and draws among them.
//
// Tokens rank by descending logits, ties by ascending token. Every truncation keeps a prefix of
// that order, found by selection: nothing is sorted but the last few tokens around the cut, so that
// even a flat row takes time in proportion to the vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "deinfer/sampling_params.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer {

struct Candidate {
  float logit = 0.0f;
  TokenId token = 0;
};

inline bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

/// Logits of `size` tokens in ascending order of the tokens; tokens null stands for 0 .. size - 1.
struct CandidateView {
  const float* logits = nullptr;
  const TokenId* tokens = nullptr;
  int size = 0;

  Candidate operator[](int i) const { return {logits[i], tokens != nullptr ? tokens[i] : i}; }
};

/// Unnormalised probabilities exp((logit - maximum) * scale); 0 for NaN. maximum is finite, and no
/// logit exceeds it.
struct Softmax {
  float maximum = 0.0f;
  float scale = 1.0f;
};

/// Owns the scratch memory of a vocabulary; nothing below allocates. Its calls keep to this order:
/// reset, any keep_*, then reads and draws. The row must stay as it is until the last of them.
class Candidates {
 public:
  // Windows up to this size are sorted; smaller ones are not worth the calls of a selection.
  static constexpr int kSortedWindow = 64;
  static constexpr int kPivotSample = 15;  // logits, whose median divides a window

  Candidates(const cpu::KernelTable& kernels, int vocab_size);

  /// Starts with all tokens of logits[vocab]; returns the largest logit, NaN counts as -inf.
  float reset(const float* logits);

  /// Keeps the tokens with logits of at least `bound`; NaN goes.
  void keep_at_least(float bound);
  /// keep_at_least(bound), and of those the first k >= 1.
  void keep_top_k(int k, float bound);
  /// Keeps the smallest number of first tokens whose probabilities sum to top_p in (0, 1).
  void keep_top_p(float top_p, const Softmax& softmax);

  /// What is left. A row from which nothing was dropped yet is viewed in place and may hold NaN.
  const CandidateView& kept() const { return kept_; }

  /// The sum of the probabilities of what is left.
  double mass(const Softmax& softmax) { return mass(kept_, softmax); }

  /// Inverts the distribution function at u in [0, 1), summed in ascending order of the tokens.
  /// Tokens of probability 0 are never drawn; at least one other must be left.
  TokenId draw_by_token(const Softmax& softmax, double u);
  /// The same, summed from the last ranked to the first.
  TokenId draw_by_rank(const Softmax& softmax, double u);

 private:
  /// Room for a vocabulary. Pages are taken when first written.
  struct List {
    explicit List(int vocab_size);
    std::unique_ptr<float[]> logits;
    std::unique_ptr<TokenId[]> tokens;
  };

  int select(const CandidateView& from, cpu::Compare compare, float bound, List& to,
             int offset = 0);
  double mass(const CandidateView& view, const Softmax& softmax);
  void keep_through(const Candidate& last);
  /// The first candidate in rank order up to which the amounts sum to at least `amount`, or the
  /// last one. measure(view) is the sum of a view's amounts; they depend on the logits only.
  template <typename Measure>
  Candidate reach(double amount, Measure measure);

  const cpu::KernelTable& kernels_;
  int vocab_size_;
  CandidateView kept_;
  List list_;                  // holds kept_, unless that is the row itself
  List windows_[2];            // of reach
  std::vector<float> maxima_;  // of the row's groups; any order
  std::vector<float> sums_;    // [ceil(vocab / kSumBlock)]
};

}  // namespace deinfer

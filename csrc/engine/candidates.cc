#include "engine/candidates.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "ops/sampling.h"

namespace deinfer {
namespace {

using cpu::Compare;

constexpr int kSortedWindow = Candidates::kSortedWindow;
constexpr int kPivotSample = Candidates::kPivotSample;

std::size_t parts(int vocab_size, int span) {
  return static_cast<std::size_t>((vocab_size + span - 1) / span);
}

constexpr double kLogTwo = 0.693147180559945309;

// About the median logit of a view.
float pivot_of(const CandidateView& view) {
  std::array<float, kPivotSample> sample;
  for (int i = 0; i < kPivotSample; ++i) {
    auto place = (std::int64_t{2} * i + 1) * view.size / (2 * kPivotSample);
    sample[static_cast<std::size_t>(i)] = view.logits[place];
  }
  auto middle = sample.begin() + kPivotSample / 2;
  std::nth_element(sample.begin(), middle, sample.end());
  return *middle;
}

// Of the `count` candidates with this logit, each of amount `unit`, the first that makes up
// `amount` with those before it, or the last.
Candidate tie_at(const CandidateView& view, float logit, int count, double amount, double unit) {
  double before = amount > unit ? std::ceil(amount / unit) - 1 : 0;
  int place = before < count - 1 ? static_cast<int>(before) : count - 1;
  for (int i = 0;; ++i) {
    if (view.logits[i] == logit && place-- == 0) return view[i];
  }
}

}  // namespace

Candidates::List::List(int vocab_size)
    : logits(std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(vocab_size))),
      tokens(std::make_unique_for_overwrite<TokenId[]>(static_cast<std::size_t>(vocab_size))) {}

Candidates::Candidates(const cpu::KernelTable& kernels, int vocab_size)
    : kernels_(kernels),
      vocab_size_(vocab_size),
      list_(vocab_size),
      windows_{List(vocab_size), List(vocab_size)},
      maxima_(parts(vocab_size, cpu::kMaximaSpan) * cpu::kLanes),
      sums_(parts(vocab_size, cpu::kSumBlock)) {}

float Candidates::reset(const float* logits) {
  kept_ = {logits, nullptr, vocab_size_};
  kernels_.group_maxima(logits, vocab_size_, maxima_.data());
  return *std::max_element(maxima_.begin(), maxima_.end());
}

int Candidates::select(const CandidateView& from, Compare compare, float bound, List& to,
                       int offset) {
  return kernels_.select(from.logits, from.tokens, from.size, compare, bound,
                         to.logits.get() + offset, to.tokens.get() + offset);
}

void Candidates::keep_at_least(float bound) {
  int size = select(kept_, Compare::kAtLeast, bound, list_);
  kept_ = {list_.logits.get(), list_.tokens.get(), size};
}

void Candidates::keep_top_k(int k, float bound) {
  auto place = static_cast<std::size_t>(k) - 1;
  if (place < maxima_.size()) {
    // k groups hold an element at least as large as the k-th largest maximum.
    auto kth = maxima_.begin() + static_cast<std::ptrdiff_t>(place);
    std::nth_element(maxima_.begin(), kth, maxima_.end(), std::greater<>());
    bound = std::max(bound, *kth);
  }
  keep_at_least(bound);
  if (kept_.size <= k) return;
  keep_through(reach(k, [](const CandidateView& view) -> double { return view.size; }));
}

void Candidates::keep_top_p(float top_p, const Softmax& softmax) {
  double total = mass(kept_, softmax);
  // What is too little to matter goes, of the power of 2 below the total: devices find the same.
  double share = tail_log_share(top_p, vocab_size_) + kLogTwo * std::ilogb(total);
  double bound = softmax.maximum + share / softmax.scale;
  float lowest = std::numeric_limits<float>::lowest();
  keep_at_least(bound > lowest ? std::nextafter(static_cast<float>(bound), lowest) : lowest);
  keep_through(
      reach(top_p * total, [&](const CandidateView& view) { return mass(view, softmax); }));
}

void Candidates::keep_through(const Candidate& last) {
  // Up to its token ties with the last one stay, beyond they go.
  const TokenId* end = kept_.tokens + kept_.size;
  auto head = static_cast<int>(std::upper_bound(kept_.tokens, end, last.token) - kept_.tokens);
  CandidateView tail = {kept_.logits + head, kept_.tokens + head, kept_.size - head};
  int size = select({kept_.logits, kept_.tokens, head}, Compare::kAtLeast, last.logit, list_);
  size += select(tail, Compare::kAbove, last.logit, list_, size);
  kept_ = {list_.logits.get(), list_.tokens.get(), size};
}

template <typename Measure>
Candidate Candidates::reach(double amount, Measure measure) {
  CandidateView window = kept_;
  int free = 0;  // the list that the window is not in
  auto narrow = [&](Compare compare, float bound) {
    List& to = windows_[free];
    int size = select(window, compare, bound, to);
    return CandidateView{to.logits.get(), to.tokens.get(), size};
  };
  while (window.size > kSortedWindow) {
    float pivot = pivot_of(window);
    CandidateView upper = narrow(Compare::kAtLeast, pivot);
    bool nothing_below = upper.size == window.size;
    if (nothing_below) upper = narrow(Compare::kAbove, pivot);
    double held = measure(upper);
    if (upper.size > 0 && amount <= held) {
      window = upper;
    } else {
      amount -= held;
      if (nothing_below) {
        double unit = measure(CandidateView{&pivot, nullptr, 1});
        return tie_at(window, pivot, window.size - upper.size, amount, unit);
      }
      window = narrow(Compare::kBelow, pivot);
    }
    free = 1 - free;
  }
  std::array<Candidate, kSortedWindow> sorted;
  for (int i = 0; i < window.size; ++i) sorted[static_cast<std::size_t>(i)] = window[i];
  std::sort(sorted.begin(), sorted.begin() + window.size, ranks_before);
  int last = 0;
  for (; last < window.size - 1; ++last) {
    amount -= measure(CandidateView{&sorted[static_cast<std::size_t>(last)].logit, nullptr, 1});
    if (amount <= 0) break;
  }
  return sorted[static_cast<std::size_t>(last)];
}

double Candidates::mass(const CandidateView& view, const Softmax& softmax) {
  kernels_.exp_blocks(view.logits, view.size, softmax.maximum, softmax.scale, sums_.data(),
                      nullptr);
  double sum = 0;
  for (std::size_t b = 0; b < parts(view.size, cpu::kSumBlock); ++b) sum += sums_[b];
  return sum;
}

TokenId Candidates::draw_by_token(const Softmax& softmax, double u) {
  double target = u * mass(kept_, softmax);
  // First the block (mass() has left their sums), then the token in it: `target` becomes what is
  // left for them.
  int block = 0;
  int blocks = static_cast<int>(parts(kept_.size, cpu::kSumBlock));
  for (int b = 0; b < blocks; ++b) {
    double sum = sums_[static_cast<std::size_t>(b)];
    if (sum <= 0) continue;
    block = b;
    if (sum > target) break;
    target -= sum;
  }
  int first = block * cpu::kSumBlock;
  int count = std::min(cpu::kSumBlock, kept_.size - first);
  std::array<float, cpu::kSumBlock> weights;
  float block_sum = 0;
  kernels_.exp_blocks(kept_.logits + first, count, softmax.maximum, softmax.scale, &block_sum,
                      weights.data());
  int place = 0;
  for (int i = 0; i < count; ++i) {
    double weight = weights[static_cast<std::size_t>(i)];
    if (weight <= 0) continue;
    place = i;
    if (weight > target) break;
    target -= weight;
  }
  return kept_[first + place].token;
}

TokenId Candidates::draw_by_rank(const Softmax& softmax, double u) {
  auto measure = [&](const CandidateView& view) { return mass(view, softmax); };
  // What lies above the target from below is reached from above.
  double total = mass(kept_, softmax);
  return reach(total - u * total, measure).token;
}

}  // namespace deinfer

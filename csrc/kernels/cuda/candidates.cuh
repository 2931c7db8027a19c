// The tokens of a row of logits that truncation leaves: engine/candidates.cc on the device, a block
// per row.
//
// Equal logits give what the host has, bit for bit. So every operation that rounds is the host's
// and stands in its order, none contracted: weights in single precision over blocks of kSumBlock by
// kSumLanes lanes, all else in double precision, one after another.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/sampling.h"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = kSampleThreads;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLists = 3;
constexpr double kLogTwo = 0.693147180559945309;

struct Candidate {
  float logit;
  int token;
};

__device__ __forceinline__ bool ranks_before(Candidate a, Candidate b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

struct Shared {
  int counts[kWarps];
  float maxima[kThreads];
  float sums[kMaxSampledVocabulary / kSumBlock];
  float weights[kSumBlock];
  Candidate window[kMaxReported];
  Candidate sorted[kMaxReported];
  double number;
  int place;
};

/// Tokens in ascending order; null stands for 0, 1, ..
struct View {
  const int* tokens;
  int size;
};

/// A row and the memory of its block.
struct Row {
  Shared& shared;
  float* logits;
  int vocabulary;
  int* lists;  // [kLists, vocabulary]

  __device__ Candidate at(View view, int i) const {
    const int token = view.tokens != nullptr ? view.tokens[i] : i;
    return {logits[token], token};
  }
  /// A list that neither of two views lies in.
  __device__ int* other_list(const int* a, const int* b) const {
    int* list = lists;
    while (list == a || list == b) list += vocabulary;
    return list;
  }
};

struct Softmax {
  float maximum;
  float scale;
};

/// Thread 0's value in every thread.
template <typename T>
__device__ __forceinline__ T broadcast(T& memory, T value) {
  __syncthreads();
  if (threadIdx.x == 0) memory = value;
  __syncthreads();
  return memory;
}

/// exp((logit - maximum) scale) as kernels/cpu/math_impl.h computes it; 0 for NaN.
__device__ __forceinline__ float weight_of(float logit, Softmax softmax) {
  float x = __fmul_rn(__fsub_rn(logit, softmax.maximum), softmax.scale);
  x = x > -87.3f ? x : -87.3f;  // NaN too, whose exp is 0 as well
  x = x < 89.0f ? x : 89.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  const float shifted = __fmaf_rn(x, 1.44269504f, kRound);
  const float n = __fsub_rn(shifted, kRound);
  float r = __fmaf_rn(n, -0.693359375f, x);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __fmaf_rn(p, r, 1.3981999507e-3f);
  p = __fmaf_rn(p, r, 8.3334519073e-3f);
  p = __fmaf_rn(p, r, 4.1665795894e-2f);
  p = __fmaf_rn(p, r, 1.6666665459e-1f);
  p = __fmaf_rn(p, r, 5.0000001201e-1f);
  const float fraction = __fmaf_rn(p, __fmul_rn(r, r), r);
  const float half = __uint_as_float((__float_as_uint(shifted) << 23) + (126u << 23));
  const float y = __fmul_rn(__fadd_rn(fraction, 1.0f), half);
  return __fadd_rn(y, y);
}

/// Writes the tokens of `from` that take(candidate) accepts to `to`, in order; returns their
/// number. `to` is another list. Each warp has a stretch of the view.
template <typename Take>
__device__ int select(const Row& row, View from, Take take, int* to) {
  const int length = tiles_of(tiles_of(from.size, kWarps), kWarp) * kWarp;
  const int begin = warp_id() * length;
  const int end = begin + length < from.size ? begin + length : from.size;
  int taken = 0;
#pragma unroll 4
  for (int i = begin + lane_id(); i < end; i += kWarp) taken += take(row.at(from, i)) ? 1 : 0;
  taken = warp_sum(taken);
  __syncthreads();  // the counts before have been read
  if (lane_id() == 0) row.shared.counts[warp_id()] = taken;
  __syncthreads();
  int place = 0;
  int total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < warp_id()) place += row.shared.counts[warp];
    total += row.shared.counts[warp];
  }
  for (int first = begin; first < end; first += kWarp) {
    const int i = first + lane_id();
    const Candidate candidate = i < end ? row.at(from, i) : Candidate{};
    const bool takes = i < end && take(candidate);
    const unsigned lanes = __ballot_sync(kAllLanes, takes);
    if (takes) to[place + __popc(lanes & ((1u << lane_id()) - 1))] = candidate.token;
    place += __popc(lanes);
  }
  __syncthreads();
  return total;
}

/// The sum of the weights of a view; those of its blocks stay in shared.sums.
__device__ double mass(const Row& row, View view, Softmax softmax) {
  const int blocks = tiles_of(view.size, kSumBlock);
  constexpr int kBlocksOfWarp = kWarp / kSumLanes;
  __syncthreads();  // the sums before have been read
  for (int first = warp_id() * kBlocksOfWarp; first < blocks; first += kWarps * kBlocksOfWarp) {
    const int block = first + lane_id() / kSumLanes;
    float sum = 0.0f;
    for (int j = lane_id() % kSumLanes; j < kSumBlock; j += kSumLanes) {
      const int i = block * kSumBlock + j;
      if (i < view.size) sum = __fadd_rn(sum, weight_of(row.at(view, i).logit, softmax));
    }
    for (int lanes = kSumLanes / 2; lanes > 0; lanes /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, lanes));
    }
    if (block < blocks && lane_id() % kSumLanes == 0) row.shared.sums[block] = sum;
  }
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int block = 0; block < blocks; ++block) total = __dadd_rn(total, row.shared.sums[block]);
  }
  return broadcast(row.shared.number, total);
}

/// About the median logit of a view, the same in every warp.
__device__ float pivot_of(const Row& row, View view) {
  const int lane = lane_id();
  float sample = 0.0f;
  if (lane < kPivotSample) {
    const std::int64_t place = (std::int64_t{2} * lane + 1) * view.size / (2 * kPivotSample);
    sample = row.at(view, static_cast<int>(place)).logit;
  }
  int before = 0;
  for (int j = 0; j < kPivotSample; ++j) {
    const float other = __shfl_sync(kAllLanes, sample, j);
    before += other < sample || (other == sample && j < lane) ? 1 : 0;
  }
  const unsigned middle =
      __ballot_sync(kAllLanes, lane < kPivotSample && before == kPivotSample / 2);
  return __shfl_sync(kAllLanes, sample, __ffs(middle) - 1);
}

/// Sorts up to kMaxReported candidates of a view into shared.sorted.
__device__ void sort(const Row& row, View view) {
  const int i = static_cast<int>(threadIdx.x);
  Candidate own = {};
  __syncthreads();  // what was sorted before has been read
  if (i < view.size) row.shared.window[i] = own = row.at(view, i);
  __syncthreads();
  if (i < view.size) {
    int rank = 0;
    for (int j = 0; j < view.size; ++j) rank += ranks_before(row.shared.window[j], own) ? 1 : 0;
    row.shared.sorted[rank] = own;
  }
  __syncthreads();
}

/// How candidates are measured: by number, or by weight.
struct Count {
  __device__ double of(const Row& /*row*/, View view) const { return view.size; }
  __device__ double unit(float /*logit*/) const { return 1.0; }
};
struct Weight {
  Softmax softmax;
  __device__ double of(const Row& row, View view) const { return mass(row, view, softmax); }
  __device__ double unit(float logit) const { return weight_of(logit, softmax); }
};

/// The first candidate in rank order up to which the measure of `kept` sums to at least `amount`,
/// or the last one.
template <typename Measure>
__device__ Candidate reach(const Row& row, View kept, double amount, Measure measure) {
  View window = kept;
  while (window.size > kSortedWindow) {
    int* list = row.other_list(kept.tokens, window.tokens);
    const float pivot = pivot_of(row, window);
    auto narrow = [&](auto take) { return View{list, select(row, window, take, list)}; };
    View upper = narrow([=](Candidate c) { return c.logit >= pivot; });
    const bool nothing_below = upper.size == window.size;
    if (nothing_below) upper = narrow([=](Candidate c) { return c.logit > pivot; });
    const double held = measure.of(row, upper);
    if (upper.size > 0 && amount <= held) {
      window = upper;
      continue;
    }
    amount = __dsub_rn(amount, held);
    if (nothing_below) {  // all others are equal
      const int count = window.size - upper.size;
      const double unit = measure.unit(pivot);
      const double before = amount > unit ? ceil(amount / unit) - 1 : 0;
      const View equal = narrow([=](Candidate c) { return c.logit == pivot; });
      return row.at(equal, before < count - 1 ? static_cast<int>(before) : count - 1);
    }
    window = narrow([=](Candidate c) { return c.logit < pivot; });
  }
  sort(row, window);
  int last = 0;
  if (threadIdx.x == 0) {
    for (; last < window.size - 1; ++last) {
      amount = __dsub_rn(amount, measure.unit(row.shared.sorted[last].logit));
      if (amount <= 0) break;
    }
  }
  return row.shared.sorted[broadcast(row.shared.place, last)];
}

__device__ View keep_at_least(const Row& row, View kept, float bound) {
  int* list = row.other_list(kept.tokens, kept.tokens);
  return {list, select(row, kept, [=](Candidate c) { return c.logit >= bound; }, list)};
}

__device__ View keep_through(const Row& row, View kept, Candidate last) {
  int* list = row.other_list(kept.tokens, kept.tokens);
  return {list, select(row, kept, [=](Candidate c) { return !ranks_before(last, c); }, list)};
}

/// The first k of all tokens of at least `bound`. `largest` is the largest of this thread's.
__device__ View keep_top_k(const Row& row, int k, float bound, float largest) {
  if (k <= kThreads) {
    // k threads have an element at least as large as the k-th largest of their largest ones.
    const int own = static_cast<int>(threadIdx.x);
    row.shared.maxima[own] = largest;
    __syncthreads();
    int rank = 0;
    for (int j = 0; j < kThreads; ++j) {
      const float other = row.shared.maxima[j];
      rank += other > largest || (other == largest && j < own) ? 1 : 0;
    }
    __syncthreads();
    if (rank == k - 1) row.shared.maxima[0] = largest;
    __syncthreads();
    bound = fmaxf(bound, row.shared.maxima[0]);
  }
  const View kept = keep_at_least(row, {nullptr, row.vocabulary}, bound);
  return kept.size <= k ? kept : keep_through(row, kept, reach(row, kept, k, Count{}));
}

__device__ View keep_top_p(const Row& row, View kept, const SampleRow& sample, Softmax softmax) {
  const double total = mass(row, kept, softmax);
  const double share = __dadd_rn(sample.tail_log_share, __dmul_rn(kLogTwo, ilogb(total)));
  const double bound = __dadd_rn(softmax.maximum, share / softmax.scale);
  constexpr float kLowest = -3.402823466e38f;
  kept = keep_at_least(row, kept,
                       bound > kLowest ? nextafterf(static_cast<float>(bound), kLowest) : kLowest);
  return keep_through(row, kept, reach(row, kept, __dmul_rn(sample.top_p, total), Weight{softmax}));
}

}  // namespace
}  // namespace deinfer::cuda

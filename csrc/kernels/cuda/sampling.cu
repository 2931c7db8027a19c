// The choice of tokens: engine/sampler.cc on the device, with the host's tokens and reports from
// the same logits, bit for bit (candidates.cuh says how).
#include "kernels/cuda/candidates.cuh"

namespace deinfer::cuda {
namespace {

__device__ int draw_by_token(const Row& row, View kept, Softmax softmax, double uniform) {
  double target = __dmul_rn(uniform, mass(row, kept, softmax));
  int block = 0;
  if (threadIdx.x == 0) {
    for (int b = 0; b < tiles_of(kept.size, kSumBlock); ++b) {
      const double sum = row.shared.sums[b];
      if (sum <= 0) continue;
      block = b;
      if (sum > target) break;
      target = __dsub_rn(target, sum);
    }
  }
  block = broadcast(row.shared.place, block);
  const int first = block * kSumBlock;
  const int count = kept.size - first < kSumBlock ? kept.size - first : kSumBlock;
  const int own = static_cast<int>(threadIdx.x);
  if (own < count) row.shared.weights[own] = weight_of(row.at(kept, first + own).logit, softmax);
  __syncthreads();
  int place = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) {
      const double weight = row.shared.weights[i];
      if (weight <= 0) continue;
      place = i;
      if (weight > target) break;
      target = __dsub_rn(target, weight);
    }
  }
  return row.at(kept, first + broadcast(row.shared.place, place)).token;
}

/// `best` is the row's largest, `largest` that of this thread's logits.
__device__ int draw(const Row& row, const SampleRow& sample, Best best, float largest) {
  const Softmax softmax = {best.value, sample.scale};
  constexpr float kLowest = -3.402823466e38f;
  float lowest = kLowest;
  if (sample.has_min_p != 0) {
    const float bound = __fadd_rn(best.value, sample.min_p_drop);
    if (bound > lowest) lowest = bound;
  }
  View kept = {nullptr, row.vocabulary};
  if (sample.top_k > 0) {
    kept = keep_top_k(row, sample.top_k, lowest, largest);
  } else if (sample.has_min_p != 0) {
    kept = keep_at_least(row, kept, lowest);
  }
  if (!(sample.top_p < 1.0)) return draw_by_token(row, kept, softmax, sample.uniform);
  kept = keep_top_p(row, kept, sample, softmax);
  const double total = mass(row, kept, softmax);
  const double target = __dsub_rn(total, __dmul_rn(sample.uniform, total));
  return reach(row, kept, target, Weight{softmax}).token;
}

/// Penalties and banned tokens. Whichever thread comes first to a token changes it.
__device__ void change_logits(const Row& row, const SampleRow& sample, const int* history,
                              int* counts) {
  const int own = static_cast<int>(threadIdx.x);
  for (int i = own; i < sample.banned; i += kThreads) {
    row.logits[history[sample.tokens + i]] = -INFINITY;
  }
  __syncthreads();
  if (sample.repetition_penalty != 1.0f) {
    for (int i = own; i < sample.tokens; i += kThreads) {
      if (atomicExch(&counts[history[i]], 1) != 0) continue;
      float& logit = row.logits[history[i]];
      logit = logit > 0 ? __fdiv_rn(logit, sample.repetition_penalty)
                        : __fmul_rn(logit, sample.repetition_penalty);
    }
    __syncthreads();
    for (int i = own; i < sample.tokens; i += kThreads) counts[history[i]] = 0;
    __syncthreads();
  }
  if (sample.presence_penalty == 0.0f && sample.frequency_penalty == 0.0f) return;
  for (int i = sample.prompt_tokens + own; i < sample.tokens; i += kThreads) {
    atomicAdd(&counts[history[i]], 1);
  }
  __syncthreads();
  for (int i = sample.prompt_tokens + own; i < sample.tokens; i += kThreads) {
    const int count = atomicExch(&counts[history[i]], 0);
    if (count == 0) continue;
    float& logit = row.logits[history[i]];
    const float times = __fmul_rn(sample.frequency_penalty, static_cast<float>(count));
    logit = __fsub_rn(logit, __fadd_rn(sample.presence_penalty, times));
  }
  __syncthreads();
}

__device__ void report(const Row& row, const SampleRow& sample, int token, SampledToken* out,
                       ReportedToken* reports) {
  const Best own = largest_of<kThreads>(row.logits, row.vocabulary);
  const float maximum = block_best<kThreads>(own).value;
  const float logit = row.logits[token];
  int above = 0;
  for (int j = static_cast<int>(threadIdx.x); j < row.vocabulary; j += kThreads) {
    above += row.logits[j] > logit ? 1 : 0;
  }
  above = warp_sum(above);
  __syncthreads();
  if (lane_id() == 0) row.shared.counts[warp_id()] = above;
  const double total = mass(row, {nullptr, row.vocabulary}, {maximum, 1.0f});
  int rank = 1;
  for (int warp = 0; warp < kWarps; ++warp) rank += row.shared.counts[warp];
  int top = sample.top < row.vocabulary ? sample.top : row.vocabulary;
  if (top > 0) {
    const View kept = keep_top_k(row, top, -INFINITY, own.value);
    sort(row, kept);
    top = kept.size;
    const int i = static_cast<int>(threadIdx.x);
    if (i < top) {
      reports[sample.report + i] = {row.shared.sorted[i].logit, row.shared.sorted[i].token};
    }
  }
  if (threadIdx.x == 0) *out = {total, maximum, logit, token, rank, top};
}

/// A block per row.
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleLaunch args) {
  __shared__ Shared shared;
  const std::int64_t index = blockIdx.x;
  const SampleRow& sample = args.samples[index];  // read where it is needed: registers are few
  if (sample.mode == SampleMode::kIdle) return;
  const Row row = {shared, args.logits + index * args.vocabulary, args.vocabulary,
                   args.lists + index * kLists * args.vocabulary};
  const int* history = args.pool + sample.history;
  float* saved = args.saved + sample.history;
  const int changed = sample.tokens + sample.banned;
  int token = sample.given;
  if (sample.mode != SampleMode::kGiven) {
    const int own = static_cast<int>(threadIdx.x);
    if (changed > 0) {
      if (sample.top >= 0) {  // reports describe the model
        for (int i = own; i < changed; i += kThreads) saved[i] = row.logits[history[i]];
        __syncthreads();
      }
      change_logits(row, sample, history, args.counts + index * args.vocabulary);
    }
    const Best largest = largest_of<kThreads>(row.logits, args.vocabulary);
    const Best best = block_best<kThreads>(largest);
    token = best.index;
    // Without a finite largest logit there is no distribution to draw from.
    if (sample.mode == SampleMode::kDraw && best.value < INFINITY && best.value > -INFINITY) {
      token = draw(row, sample, best, largest.value);
    }
    if (changed > 0 && sample.top >= 0) {
      __syncthreads();  // the changed ones have been read
      for (int i = own; i < changed; i += kThreads) row.logits[history[i]] = saved[i];
      __syncthreads();
    }
  }
  if (sample.top >= 0) {
    report(row, sample, token, args.out + index, args.reports);
  } else if (threadIdx.x == 0) {
    args.out[index].token = token;
  }
}

}  // namespace

int load_sampling_kernels() { return load(sample_kernel); }

int launch_sample(const SampleLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.rows), kThreads, sample_kernel, args);
}

}  // namespace deinfer::cuda

// Kernels over one row: normalisation, argmax, sums, selection. Include epilogue_impl.h before.
#pragma once

namespace deinfer::cpu {
namespace {

/// f(first element, elements) for the vectors of a row of n.
template <typename F>
inline void for_each_chunk(int n, F f) {
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, kLanes);
  if (j < n) f(j, n - j);
}

inline float sum_squares(const float* x, int n) {
  Vec squares = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = load_some(x + j, count);
    squares = fma(v, v, squares);
  });
  return reduce_add(squares);
}

template <typename Out>
void rms_norm(const float* x, const float* gain, int n, float eps, Out* out) {
  float mean = sum_squares(x, n) / static_cast<float>(n);
  Vec scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for_each_chunk(n, [&](int j, int count) {
    Vec v = mul(load_some(x + j, count), scale);
    store_some(out + j, mul(v, load_some(gain + j, count)), count);
  });
}

inline float mean_of(const float* x, int n) {
  Vec sum = zero();
  for_each_chunk(n, [&](int j, int count) { sum = add(sum, load_some(x + j, count)); });
  return reduce_add(sum) / static_cast<float>(n);
}

template <typename Out>
void layer_norm(const float* x, const float* gain, const float* bias, int n, float eps, Out* out) {
  Vec mean = broadcast(mean_of(x, n));
  Vec squares = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = keep_range(sub(load_some(x + j, count), mean), 0, count, 0.0f);
    squares = fma(v, v, squares);
  });
  float variance = reduce_add(squares) / static_cast<float>(n);
  Vec scale = broadcast(1.0f / __builtin_sqrtf(variance + eps));
  for_each_chunk(n, [&](int j, int count) {
    Vec v = mul(sub(load_some(x + j, count), mean), scale);
    store_some(out + j, fma(v, load_some(gain + j, count), load_some(bias + j, count)), count);
  });
}

template <typename Out>
void copy_row(const float* x, int n, Out* out) {
  for_each_chunk(n, [&](int j, int count) { store_some(out + j, load_some(x + j, count), count); });
}

void add_row(const float* x, int n, float* out) {
  for_each_chunk(n, [&](int j, int count) {
    store_some(out + j, add(load_some(out + j, count), load_some(x + j, count)), count);
  });
}

void scale_row(float* x, int n, float scale) {
  for_each_chunk(n, [&](int j, int count) {
    store_some(x + j, mul(load_some(x + j, count), broadcast(scale)), count);
  });
}

void soft_cap(float* x, int n, float cap) {
  for_each_chunk(n, [&](int j, int count) {
    Vec v = tanh(mul(load_some(x + j, count), broadcast(1.0f / cap)));
    store_some(x + j, mul(broadcast(cap), v), count);
  });
}

void argmax(const float* x, int n, float* value, int* index) {
  // max(x, best) keeps best when x is NaN.
  Vec best = broadcast(-kInfinity);
  for_each_chunk(n, [&](int j, int count) {
    best = max(keep_range(load_some(x + j, count), 0, count, -kInfinity), best);
  });
  float largest = reduce_max(best);
  *value = largest;
  *index = 0;  // stays when every element is -inf or NaN
  if (largest == -kInfinity) return;
  for (int j = 0; j < n; j += kLanes) {
    int count = n - j < kLanes ? n - j : kLanes;
    std::uint32_t hits = equal_lanes(load_some(x + j, count), broadcast(largest));
    hits &= (1u << count) - 1u;
    if (hits == 0) continue;
    *index = j + __builtin_ctz(hits);
    return;
  }
}

void group_maxima(const float* x, int n, float* maxima) {
  for (int begin = 0; begin < n; begin += kMaximaSpan, maxima += kLanes) {
    // A group is a lane of a span, which needs no reduction across lanes.
    Vec best = broadcast(-kInfinity);
    for_each_chunk(n - begin < kMaximaSpan ? n - begin : kMaximaSpan, [&](int j, int count) {
      Vec v = keep_range(load_some(x + begin + j, count), 0, count, -kInfinity);
      best = max(v, best);  // best when v is NaN
    });
    store(maxima, best);
  }
}

template <Compare kCompare>
int select_all(const float* x, const std::int32_t* ids, int n, float bound, float* out_x,
               std::int32_t* out_ids) {
  Vec limit = broadcast(bound);
  int taken = 0;
  for_each_chunk(n, [&](int j, int count) {
    Vec v = load_some(x + j, count);
    std::uint32_t hits = kCompare == Compare::kAbove     ? greater_lanes(v, limit)
                         : kCompare == Compare::kAtLeast ? at_least_lanes(v, limit)
                                                         : greater_lanes(limit, v);
    hits &= (1u << count) - 1u;
    if (hits == 0) return;
    compress(x + j, hits, out_x + taken);
    if (ids != nullptr) {
      compress(ids + j, hits, out_ids + taken);
    } else {
      compress_index(j, hits, out_ids + taken);
    }
    taken += __builtin_popcount(hits);
  });
  return taken;
}

int select(const float* x, const std::int32_t* ids, int n, Compare compare, float bound,
           float* out_x, std::int32_t* out_ids) {
  switch (compare) {
    case Compare::kAbove: return select_all<Compare::kAbove>(x, ids, n, bound, out_x, out_ids);
    case Compare::kAtLeast: return select_all<Compare::kAtLeast>(x, ids, n, bound, out_x, out_ids);
    case Compare::kBelow: return select_all<Compare::kBelow>(x, ids, n, bound, out_x, out_ids);
  }
  __builtin_unreachable();
}

void exp_blocks(const float* x, int n, float shift, float scale, float* sums, float* weights) {
  for (int begin = 0; begin < n; begin += kSumBlock) {
    Vec sum = zero();
    for_each_chunk(n - begin < kSumBlock ? n - begin : kSumBlock, [&](int j, int count) {
      Vec v = mul(sub(load_some(x + begin + j, count), broadcast(shift)), broadcast(scale));
      // max(v, -inf) is -inf when v is NaN.
      v = exp(max(keep_range(v, 0, count, -kInfinity), broadcast(-kInfinity)));
      sum = add(sum, v);
      if (weights != nullptr) store_some(weights + begin + j, v, count);
    });
    *sums++ = reduce_add(sum);
  }
}

}  // namespace
}  // namespace deinfer::cpu

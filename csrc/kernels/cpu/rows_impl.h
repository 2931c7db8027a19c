// Kernels over one row: normalisation, argmax, sums. Include epilogue_impl.h before.
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

template <typename Out>
void rms_norm(const float* x, const float* gain, int n, float eps, Out* out) {
  Vec squares = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = load_some(x + j, count);
    squares = fma(v, v, squares);
  });
  float mean = reduce_add(squares) / static_cast<float>(n);
  Vec scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for_each_chunk(n, [&](int j, int count) {
    Vec v = mul(load_some(x + j, count), scale);
    store_some(out + j, mul(v, load_some(gain + j, count)), count);
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

float exp_sum(const float* x, int n, float shift, float scale) {
  Vec sum = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = mul(sub(load_some(x + j, count), broadcast(shift)), broadcast(scale));
    sum = add(sum, exp(keep_range(v, 0, count, -kInfinity)));
  });
  return reduce_add(sum);
}

}  // namespace
}  // namespace deinfer::cpu

// Kernels on both sides of an exchange between ranks. Include rows_impl.h before.
#pragma once

namespace deinfer::cpu {
namespace {

/// out[i, j] = scale[i] * (parts[0][i, j] + parts[1][i, j] + ...), added in this order.
template <typename Out>
void sum_parts(const float* const* parts, int num_parts, std::ptrdiff_t ld, int rows, int cols,
               const float* scale, Out* out, std::ptrdiff_t ldo) {
  for (int i = 0; i < rows; ++i) {
    Vec factor = broadcast(scale == nullptr ? 1.0f : scale[i]);
    for_each_chunk(cols, [&](int j, int count) {
      Vec sum = load_some(parts[0] + i * ld + j, count);
      for (int p = 1; p < num_parts; ++p) sum = add(sum, load_some(parts[p] + i * ld + j, count));
      store_some(out + i * ldo + j, mul(sum, factor), count);
    });
  }
}

template <typename Out>
float apply_gain(const float* x, const float* gain, int n, Out* out) {
  for_each_chunk(n, [&](int j, int count) {
    store_some(out + j, mul(load_some(x + j, count), load_some(gain + j, count)), count);
  });
  return sum_squares(x, n);
}

}  // namespace
}  // namespace deinfer::cpu

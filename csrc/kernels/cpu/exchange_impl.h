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
void sum_centered_parts(const float* const* parts, int num_parts, std::ptrdiff_t ld, int rows,
                        int cols, const Centering& centering, Out* out, std::ptrdiff_t ldo) {
  for (int i = 0; i < rows; ++i) {
    Vec factor = broadcast(centering.scale[i]);
    const float* shifts = centering.shifts + std::ptrdiff_t{i} * num_parts;
    for_each_chunk(cols, [&](int j, int count) {
      Vec sum = zero();
      for (int p = 0; p < num_parts; ++p) {
        Vec gain = load_some(centering.gain + p * centering.ld + j, count);
        sum = add(sum, load_some(parts[p] + i * ld + j, count));
        sum = fma(broadcast(shifts[p]), gain, sum);
      }
      store_some(out + i * ldo + j, fma(sum, factor, load_some(centering.bias + j, count)), count);
    });
  }
}

template <typename Out>
float apply_gain(const float* x, const float* gain, int n, Out* out) {
  Vec squares = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = load_some(x + j, count);
    squares = fma(v, v, squares);
    store_some(out + j, mul(v, load_some(gain + j, count)), count);
  });
  return reduce_add(squares);
}

template <typename Out>
void center_row(const float* x, const float* gain, int n, Out* out, float* statistics) {
  statistics[0] = n == 0 ? 0.0f : mean_of(x, n);
  Vec mean = broadcast(statistics[0]);
  Vec squares = zero();
  for_each_chunk(n, [&](int j, int count) {
    Vec v = keep_range(sub(load_some(x + j, count), mean), 0, count, 0.0f);
    squares = fma(v, v, squares);
    store_some(out + j, mul(v, load_some(gain + j, count)), count);
  });
  statistics[1] = reduce_add(squares);
}

}  // namespace
}  // namespace deinfer::cpu

// Tensor-core products in software, in place of csrc/kernels/cuda/mma.cuh: the fragment layouts of
// PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16 with floating point type".
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace deinfer::cuda {

inline void mma_bf16(float (&d)[4], const uint4& a, unsigned b0, unsigned b1,
                     int line = __builtin_LINE()) {
  struct Fragments {
    unsigned a[4], b[2];
  };
  const Fragments own = {{a.x, a.y, a.z, a.w}, {b0, b1}};
  const std::byte* shared = emulation::exchange(&own, sizeof own, line);
  auto of_lane = [&](int lane) {
    Fragments f;
    std::memcpy(&f, shared + sizeof f * static_cast<std::size_t>(lane), sizeof f);
    return f;
  };
  auto half = [](unsigned pair, int i) {
    return to_float(bf16{static_cast<std::uint16_t>(pair >> (16 * i))});
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 4;
  const int col = lane % 4 * 2;
  // Four lanes have the rows of A that matter here, four each the two columns of B.
  float rows[2][16], cols[2][16];
  for (int quad = 0; quad < 4; ++quad) {
    const Fragments left = of_lane(4 * row + quad);
    const Fragments first = of_lane(4 * col + quad);
    const Fragments second = of_lane(4 * (col + 1) + quad);
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * quad + i;
      rows[0][k] = half(left.a[0], i);
      rows[1][k] = half(left.a[1], i);
      rows[0][k + 8] = half(left.a[2], i);
      rows[1][k + 8] = half(left.a[3], i);
      cols[0][k] = half(first.b[0], i);
      cols[0][k + 8] = half(first.b[1], i);
      cols[1][k] = half(second.b[0], i);
      cols[1][k + 8] = half(second.b[1], i);
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += rows[i / 2][k] * cols[i % 2][k];
    d[i] += sum;
  }
}

}  // namespace deinfer::cuda

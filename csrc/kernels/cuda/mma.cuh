// The tensor-core product that all matrix kernels are made of.
#pragma once

#include <cuda_runtime.h>

namespace deinfer::cuda {

/// d[16, 8] += a[16, 16] b[16, 8] of the warp, bf16 with fp32 sums, fragments as in PTX ISA,
/// "Matrix Fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint4& a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace deinfer::cuda

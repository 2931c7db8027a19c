// What deinfer uses of <cuda_bf16.h>, for g++.
#pragma once

#include "base/bf16.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {deinfer::to_bf16(value).bits}; }
inline float __bfloat162float(__nv_bfloat16 value) { return deinfer::to_float({value.bits}); }
/// Of two bf16 a product in fp32 is exact but for its range, which is that of bf16.
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(__bfloat162float(a.x) * __bfloat162float(b.x)),
          __float2bfloat16_rn(__bfloat162float(a.y) * __bfloat162float(b.y))};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

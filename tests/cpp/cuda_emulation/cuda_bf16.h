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
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

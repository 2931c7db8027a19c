// exp and silu, the same operations in every instruction set. Include a simd_*.h before.
#pragma once

namespace deinfer::cpu {
namespace {

inline constexpr float kInfinity = __builtin_inff();

/// exp(x) to about 1 ulp. Results below 2^-125 become 0, above the largest float infinity; NaN
/// stays NaN.
inline Vec exp(Vec x) {
  // 2^(n - 1) is an exponent field of 0, that is zero, at the lower bound, and n = 128 at the upper
  // one overflows in the last multiplication. NaN passes as the second operand of max and min.
  x = min(broadcast(89.0f), max(broadcast(-87.3f), x));
  constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x / ln 2) in the low bits
  Vec shifted = fma(x, broadcast(1.44269504f), broadcast(kRound));
  Vec n = sub(shifted, broadcast(kRound));
  Vec r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts (Cephes)
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), broadcast(1.0f));
  p = mul(p, exponent_from_bits(shifted, 126u << 23));
  return add(p, p);
}

/// x / (1 + exp(-x)); -0 for very negative x.
inline Vec silu(Vec x) { return div(x, add(broadcast(1.0f), exp(sub(zero(), x)))); }

}  // namespace
}  // namespace deinfer::cpu

// exp and functions made of it, the same operations in every instruction set. Include a simd_*.h
// before.
#pragma once

namespace deinfer::cpu {
namespace {

inline constexpr float kInfinity = __builtin_inff();

/// exp(x) = 2^n (1 + fraction), n in the low bits of `exponent`.
struct SplitExp {
  Vec exponent;
  Vec fraction;
};

inline SplitExp split_exp(Vec x) {
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
  return {shifted, fma(p, mul(r, r), r)};
}

/// exp(x) to about 1 ulp. Results below 2^-125 become 0, above the largest float infinity; NaN
/// stays NaN.
inline Vec exp(Vec x) {
  // 2^(n - 1) is an exponent field of 0, that is zero, at the lower bound, and n = 128 at the upper
  // one overflows in the last multiplication. NaN passes as the second operand of max and min.
  SplitExp e = split_exp(min(broadcast(89.0f), max(broadcast(-87.3f), x)));
  Vec p = mul(add(e.fraction, broadcast(1.0f)), exponent_from_bits(e.exponent, 126u << 23));
  return add(p, p);
}

/// x / (1 + exp(-x)); -0 for very negative x.
inline Vec silu(Vec x) { return div(x, add(broadcast(1.0f), exp(sub(zero(), x)))); }

/// tanh(x) to 3 ulp, also of small x; NaN stays NaN.
inline Vec tanh(Vec x) {
  // t / (t + 2) where t = exp(2 x) - 1 is summed without cancellation: around 0, where n = 0, it is
  // the fraction itself.
  SplitExp e = split_exp(min(broadcast(20.0f), max(broadcast(-20.0f), add(x, x))));
  Vec power = exponent_from_bits(e.exponent, 127u << 23);
  Vec t = fma(e.fraction, power, sub(power, broadcast(1.0f)));
  return div(t, add(t, broadcast(2.0f)));
}

/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), torch's gelu(approximate="tanh"), written
/// as x / (1 + exp(-2 ...)), in which nothing cancels.
inline Vec gelu_tanh(Vec x) {
  Vec slope = fma(mul(x, x), broadcast(-0.0713548162726f), broadcast(-1.59576912161f));
  return div(x, add(broadcast(1.0f), exp(mul(x, slope))));
}

}  // namespace
}  // namespace deinfer::cpu

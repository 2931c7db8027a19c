// "16 floats" in plain C++: the reference of the simd_*.h headers, which all offer these names.
//
// A kernel TU includes one simd_*.h and then the *_impl.h headers. All of them live in an anonymous
// namespace and call no inline function of the library, so that the linker can never pick a
// function built for AVX-512 for code that must run without it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {
namespace {

struct Vec {
  float lane[kLanes];
};

// Tokens that one GEMM micro kernel holds in registers, and the vectors of accumulators and the
// rows of an attention micro kernel.
inline constexpr int kGemmTokensF32 = 1;
inline constexpr int kGemmTokensBf16 = 1;
/// Whether the GEMM of floats reads the inputs of a step before its weights, by fma_tokens.
inline constexpr bool kFloatInputsFirst = true;
inline constexpr int kAttentionVectors = 4;
inline constexpr int kAttentionBlock = 1;

/// A vector of f(lane).
template <typename F>
inline Vec make_vec(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = f(i);
  return out;
}

inline std::uint32_t bits_of(float v) { return __builtin_bit_cast(std::uint32_t, v); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline float widen(bf16 v) { return float_of(std::uint32_t{v.bits} << 16); }
inline bf16 narrow(float v) {  // to nearest even; NaN stays NaN
  std::uint32_t u = bits_of(v);
  if (v != v) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline Vec zero() {
  return make_vec([](int) { return 0.0f; });
}
inline Vec broadcast(float v) {
  return make_vec([=](int) { return v; });
}
inline Vec load(const float* p) {
  return make_vec([=](int i) { return p[i]; });
}
inline Vec load(const bf16* p) {
  return make_vec([=](int i) { return widen(p[i]); });
}
/// The first n <= 16 elements and zeros; touches no other memory.
inline Vec load_n(const float* p, int n) {
  return make_vec([=](int i) { return i < n ? p[i] : 0.0f; });
}
inline Vec load_n(const bf16* p, int n) {
  return make_vec([=](int i) { return i < n ? widen(p[i]) : 0.0f; });
}
inline void store_n(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v.lane[i];
}
inline void store_n(bf16* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow(v.lane[i]);
}
inline void store(float* p, Vec v) { store_n(p, v, kLanes); }
inline void store(bf16* p, Vec v) { store_n(p, v, kLanes); }

inline Vec add(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] / b.lane[i]; });
}
/// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) {
  return make_vec([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
/// b when either is NaN, as the instruction does.
inline Vec max(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return make_vec([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

/// (bits of v << 23) + bias as a float: 2^e when the low bits of v hold e and bias the exponent's.
inline Vec exponent_from_bits(Vec v, std::uint32_t bias) {
  return make_vec([&](int i) { return float_of((bits_of(v.lane[i]) << 23) + bias); });
}

/// v in the lanes [begin, end), `other` elsewhere; begin and end may lie outside [0, 16].
inline Vec keep_range(Vec v, int begin, int end, float other) {
  return make_vec([&](int i) { return i >= begin && i < end ? v.lane[i] : other; });
}
/// Bit i is set when a == b in lane i.
inline std::uint32_t equal_lanes(Vec a, Vec b) {
  std::uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= std::uint32_t{a.lane[i] == b.lane[i]} << i;
  return mask;
}
/// Bit i is set when a > b, a >= b in lane i; never for NaN.
inline std::uint32_t greater_lanes(Vec a, Vec b) {
  std::uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= std::uint32_t{a.lane[i] > b.lane[i]} << i;
  return mask;
}
inline std::uint32_t at_least_lanes(Vec a, Vec b) {
  std::uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= std::uint32_t{a.lane[i] >= b.lane[i]} << i;
  return mask;
}

/// Copies the elements of from[16] whose bit is set to the front of `to`, which may be `from` or
/// lie before it. There is a bit; nothing after the last one is read, nor more written.
template <typename T>
inline void compress(const T* from, std::uint32_t bits, T* to) {
  for (; bits != 0; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
}
/// The same for the numbers first .. first + 15.
inline void compress_index(int first, std::uint32_t bits, std::int32_t* to) {
  for (; bits != 0; bits &= bits - 1) *to++ = first + __builtin_ctz(bits);
}

/// Lanes are combined with those 8, 4, 2 and 1 further, in every instruction set.
inline float reduce_add(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v.lane[i] = v.lane[i] + v.lane[i + half];
  }
  return v.lane[0];
}
inline float reduce_max(Vec v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
    }
  }
  return v.lane[0];
}

/// The elements of each pair of lanes the other way round.
inline Vec swap_pairs(const Vec& v) {
  return make_vec([&](int i) { return v.lane[i ^ 1]; });
}

/// Two halves of 8 floats each, of rows that fill no vector.
inline Vec load_halves(const float* low, const float* high) {
  return make_vec([=](int i) { return i < kHalfLanes ? low[i] : high[i - kHalfLanes]; });
}
inline Vec join_halves(const Vec& low, const Vec& high) {
  return make_vec([&](int i) { return i < kHalfLanes ? low.lane[i] : high.lane[i]; });
}
inline void store_low_half(float* p, const Vec& v) {
  for (int i = 0; i < kHalfLanes; ++i) p[i] = v.lane[i];
}
inline void store_high_half(float* p, const Vec& v) {
  for (int i = 0; i < kHalfLanes; ++i) p[i] = v.lane[kHalfLanes + i];
}

/// 16 pairs of bf16: weights of 16 rows, or one pair of inputs in every lane. Without an
/// instruction for pairs they are multiplied in two phases, first the odd elements, then the even
/// ones.
using Pairs = Vec;
inline constexpr int kPairPhases = 2;

template <int kPhase>
inline Pairs load_pairs(const bf16* p) {
  return make_vec([=](int i) { return widen(p[2 * i + 1 - kPhase]); });
}
template <int kPhase>
inline Pairs broadcast_pair(const bf16* p) {
  return broadcast(widen(p[1 - kPhase]));
}
inline Vec pair_dot(Vec acc, const Pairs& w, const Pairs& x) { return fma(w, x, acc); }

/// sums[i][column] += 16 weights * x[i] for all tokens i, where every lane of x[i] is the same. Of
/// bf16 pairs these are the weights of a phase.
template <int kPhase, int kTokens, int kVecs, typename Weight>
inline void fma_tokens(const Weight* w, const Vec (&x)[kTokens], int column,
                       Vec (&sums)[kTokens][kVecs]) {
  Vec weights;
  if constexpr (sizeof(Weight) == 2) {
    weights = load_pairs<kPhase>(w);
  } else {
    weights = load(w);
  }
  for (int i = 0; i < kTokens; ++i) sums[i][column] = fma(weights, x[i], sums[i][column]);
}

/// The weights of 8 rows in both halves.
template <int kPhase>
inline Pairs load_pairs_twice(const bf16* p) {
  return make_vec([=](int i) { return widen(p[2 * (i % kHalfLanes) + 1 - kPhase]); });
}

/// The 64 bytes of an int8 panel at p (kernel_table.h) as pairs of the rows 0..15 and 16..31.
template <int kPhase>
inline void load_int8_pairs(const std::int8_t* p, Pairs (&out)[2]) {
  for (int half = 0; half < 2; ++half) {
    out[half] = make_vec([=](int i) {
      auto byte = static_cast<std::uint8_t>(p[i / 4 * 16 + half * 8 + i % 4 * 2 + 1 - kPhase]);
      auto magnitude = static_cast<float>(byte & 0x7f);
      return (byte & 0x80) != 0 ? -magnitude : magnitude;
    });
  }
}
/// The same 64 weights in the order of a bf16 panel, [32 rows][2].
inline void expand_int8(const std::int8_t* p, bf16* out) {
  Pairs odd[2];
  Pairs even[2];
  load_int8_pairs<0>(p, odd);
  load_int8_pairs<1>(p, even);
  for (int i = 0; i < kPanelRows; ++i) {
    out[2 * i] = to_bf16(even[i / kLanes].lane[i % kLanes]);
    out[2 * i + 1] = to_bf16(odd[i / kLanes].lane[i % kLanes]);
  }
}

}  // namespace
}  // namespace deinfer::cpu

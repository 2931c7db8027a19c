// "16 floats" as two AVX2 registers; see simd_scalar.h for what the functions promise.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {
namespace {

struct Vec {
  __m256 lo;
  __m256 hi;
};

// 16 registers: in the GEMM of floats 12 hold accumulators (3 tokens x 32 rows), 3 inputs and one
// weights; in that of bf16, which it must widen, 8 hold accumulators.
inline constexpr int kGemmTokensF32 = 3;
inline constexpr bool kFloatInputsFirst = true;
inline constexpr int kGemmTokensBf16 = 2;
inline constexpr int kAttentionVectors = 4;
inline constexpr int kAttentionBlock = 4;

inline __m256i lane_index(int first) {
  return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
}
/// All ones in the lanes (first + i) < n.
inline __m256i lanes_below(int first, int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_index(first));
}
inline __m256 widen(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
/// bf16 bits in the low half of each 32-bit lane, to nearest even; NaN stays NaN.
inline __m256i narrow_bits(__m256 v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i high = _mm256_srli_epi32(u, 16);
  __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
}

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec broadcast(float v) {
  __m256 r = _mm256_set1_ps(v);
  return {r, r};
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16* p) {
  auto* words = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(words)), widen(_mm_loadu_si128(words + 1))};
}
inline Vec load_n(const float* p, int n) {
  // A masked-out half may lie outside the array, but it is never read.
  return {_mm256_maskload_ps(p, lanes_below(0, n)), _mm256_maskload_ps(p + 8, lanes_below(8, n))};
}
inline Vec load_n(const bf16* p, int n) {
  alignas(32) bf16 copy[kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}
inline void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline void store(bf16* p, Vec v) {
  __m256i packed = _mm256_packus_epi32(narrow_bits(v.lo), narrow_bits(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_n(float* p, Vec v, int n) {
  _mm256_maskstore_ps(p, lanes_below(0, n), v.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(8, n), v.hi);
}
inline void store_n(bf16* p, Vec v, int n) {
  alignas(32) bf16 copy[kLanes];
  store(copy, v);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }

inline __m256 exponent_from_bits(__m256 v, std::uint32_t bias) {
  __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(static_cast<int>(bias))));
}
inline Vec exponent_from_bits(Vec v, std::uint32_t bias) {
  return {exponent_from_bits(v.lo, bias), exponent_from_bits(v.hi, bias)};
}

inline __m256 keep_range(__m256 v, int first, int begin, int end, float other) {
  __m256i inside = _mm256_andnot_si256(lanes_below(first, begin), lanes_below(first, end));
  return _mm256_blendv_ps(_mm256_set1_ps(other), v, _mm256_castsi256_ps(inside));
}
inline Vec keep_range(Vec v, int begin, int end, float other) {
  return {keep_range(v.lo, 0, begin, end, other), keep_range(v.hi, 8, begin, end, other)};
}

template <int kPredicate>
inline std::uint32_t compare_lanes(Vec a, Vec b) {
  int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, kPredicate));
  int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, kPredicate));
  return static_cast<std::uint32_t>(lo | hi << 8);
}
inline std::uint32_t equal_lanes(Vec a, Vec b) { return compare_lanes<_CMP_EQ_OQ>(a, b); }
inline std::uint32_t greater_lanes(Vec a, Vec b) { return compare_lanes<_CMP_GT_OQ>(a, b); }
inline std::uint32_t at_least_lanes(Vec a, Vec b) { return compare_lanes<_CMP_GE_OQ>(a, b); }

/// For each mask of 8 lanes, the lanes that are set in ascending order, a byte each.
struct PackedLanes {
  constexpr PackedLanes() {
    for (unsigned bits = 0; bits < 256; ++bits) {
      int place = 0;
      for (unsigned i = 0; i < 8; ++i) {
        if (bits >> i & 1) of[bits] |= std::uint64_t{i} << (8 * place++);
      }
    }
  }
  std::uint64_t of[256] = {};
};
inline constexpr PackedLanes kPackedLanes;

/// Stores the lanes of v whose bit is set side by side.
inline void store_packed(__m256i v, std::uint32_t bits, std::int32_t* to) {
  __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(kPackedLanes.of[bits]));
  __m256i packed = _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(bytes));
  _mm256_maskstore_epi32(to, lanes_below(0, __builtin_popcount(bits)), packed);
}
inline void store_packed(__m256 v, std::uint32_t bits, float* to) {
  __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(kPackedLanes.of[bits]));
  __m256 packed = _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(bytes));
  _mm256_maskstore_ps(to, lanes_below(0, __builtin_popcount(bits)), packed);
}
inline void compress(const float* from, std::uint32_t bits, float* to) {
  Vec v = load_n(from, 32 - __builtin_clz(bits));
  store_packed(v.lo, bits & 0xff, to);
  store_packed(v.hi, bits >> 8, to + __builtin_popcount(bits & 0xff));
}
inline void compress(const std::int32_t* from, std::uint32_t bits, std::int32_t* to) {
  int n = 32 - __builtin_clz(bits);
  __m256i lo = _mm256_maskload_epi32(from, lanes_below(0, n));
  __m256i hi = _mm256_maskload_epi32(from + 8, lanes_below(8, n));
  store_packed(lo, bits & 0xff, to);
  store_packed(hi, bits >> 8, to + __builtin_popcount(bits & 0xff));
}
inline void compress_index(int first, std::uint32_t bits, std::int32_t* to) {
  store_packed(lane_index(first), bits & 0xff, to);
  store_packed(lane_index(first + 8), bits >> 8, to + __builtin_popcount(bits & 0xff));
}

inline float reduce_add(Vec v) {
  __m256 a = _mm256_add_ps(v.lo, v.hi);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float reduce_max(Vec v) {
  __m256 a = _mm256_max_ps(v.lo, v.hi);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

inline Vec swap_pairs(const Vec& v) {
  return {_mm256_permute_ps(v.lo, 0xb1), _mm256_permute_ps(v.hi, 0xb1)};
}

inline Vec load_halves(const float* low, const float* high) {
  return {_mm256_loadu_ps(low), _mm256_loadu_ps(high)};
}
inline Vec join_halves(const Vec& low, const Vec& high) { return {low.lo, high.hi}; }
inline void store_low_half(float* p, const Vec& v) { _mm256_storeu_ps(p, v.lo); }
inline void store_high_half(float* p, const Vec& v) { _mm256_storeu_ps(p, v.hi); }

using Pairs = Vec;
inline constexpr int kPairPhases = 2;

template <int kPhase>
inline __m256 elements_of(__m256i pairs) {
  return _mm256_castsi256_ps(kPhase == 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(-65536))
                                         : _mm256_slli_epi32(pairs, 16));
}
template <int kPhase>
inline Pairs load_pairs(const bf16* p) {
  auto* words = reinterpret_cast<const __m256i*>(p);
  return {elements_of<kPhase>(_mm256_loadu_si256(words)),
          elements_of<kPhase>(_mm256_loadu_si256(words + 1))};
}
template <int kPhase>
inline Pairs broadcast_pair(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  __m256 element = elements_of<kPhase>(_mm256_set1_epi32(pair));
  return {element, element};
}
inline Vec pair_dot(Vec acc, const Pairs& w, const Pairs& x) { return fma(w, x, acc); }

template <int kTokens, int kVecs>
inline void fma_tokens(__m256 weights, const Vec (&x)[kTokens], int column,
                       Vec (&sums)[kTokens][kVecs], __m256 Vec::* half) {
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
    sums[i][column].*half = _mm256_fmadd_ps(weights, x[i].lo, sums[i][column].*half);
  }
}
template <int kPhase, int kTokens, int kVecs>
inline void fma_tokens(const float* w, const Vec (&x)[kTokens], int column,
                       Vec (&sums)[kTokens][kVecs]) {
  fma_tokens(_mm256_loadu_ps(w), x, column, sums, &Vec::lo);
  fma_tokens(_mm256_loadu_ps(w + 8), x, column, sums, &Vec::hi);
}
template <int kPhase, int kTokens, int kVecs>
inline void fma_tokens(const bf16* w, const Vec (&x)[kTokens], int column,
                       Vec (&sums)[kTokens][kVecs]) {
  auto* words = reinterpret_cast<const __m256i*>(w);
  fma_tokens(elements_of<kPhase>(_mm256_loadu_si256(words)), x, column, sums, &Vec::lo);
  fma_tokens(elements_of<kPhase>(_mm256_loadu_si256(words + 1)), x, column, sums, &Vec::hi);
}

template <int kPhase>
inline Pairs load_pairs_twice(const bf16* p) {
  __m256 element = elements_of<kPhase>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {element, element};
}

// A byte's sign goes to bit 31 and its magnitude m to the top mantissa bits of 128 + m, so that
// subtracting 128 leaves m exactly.
template <int kPhase>
inline __m256 int8_elements(__m256i bytes, int half) {
  __m256i pick = _mm256_setr_epi8(-1, -1, 0, 0, -1, -1, 2, 2, -1, -1, 4, 4, -1, -1, 6, 6, -1, -1, 0,
                                  0, -1, -1, 2, 2, -1, -1, 4, 4, -1, -1, 6, 6);
  pick = _mm256_add_epi8(pick, _mm256_set1_epi32(((8 * half + 1 - kPhase) * 0x0101) << 16));
  __m256i value = _mm256_shuffle_epi8(bytes, pick);
  __m256i magnitude = _mm256_and_si256(value, _mm256_set1_epi32(0x007f0000));
  __m256 shifted = _mm256_castsi256_ps(_mm256_or_si256(magnitude, _mm256_set1_epi32(0x43000000)));
  __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(value), _mm256_set1_ps(-0.0f));
  return _mm256_or_ps(_mm256_sub_ps(shifted, _mm256_set1_ps(128.0f)), sign);
}
template <int kPhase>
inline void load_int8_pairs(const std::int8_t* p, Pairs (&out)[2]) {
  auto* bytes = reinterpret_cast<const __m256i*>(p);
  __m256i low = _mm256_loadu_si256(bytes);
  __m256i high = _mm256_loadu_si256(bytes + 1);
  out[0] = {int8_elements<kPhase>(low, 0), int8_elements<kPhase>(high, 0)};
  out[1] = {int8_elements<kPhase>(low, 1), int8_elements<kPhase>(high, 1)};
}
inline void expand_int8(const std::int8_t* p, bf16* out) {
  auto* bytes = reinterpret_cast<const __m256i*>(p);
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m256i source = _mm256_loadu_si256(bytes + quarter % 2);
    __m256i odd = _mm256_castps_si256(int8_elements<0>(source, quarter / 2));
    __m256i even = _mm256_castps_si256(int8_elements<1>(source, quarter / 2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + quarter,
                        _mm256_or_si256(odd, _mm256_srli_epi32(even, 16)));
  }
}

}  // namespace
}  // namespace deinfer::cpu

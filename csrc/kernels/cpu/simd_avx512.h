// "16 floats" as one AVX-512 register; see simd_scalar.h for what the functions promise.
// What differs with the BF16 extension is in simd_avx512_fma.h and simd_avx512_bf16.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"

// g++ 12 warns about the undefined operands of its own intrinsics (GCC PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace deinfer::cpu {
namespace {

using Vec = __m512;

// 32 registers: 16 accumulators in the GEMM (8 tokens x 32 rows), up to 24 in attention.
inline constexpr int kGemmTokensF32 = 8;
inline constexpr int kGemmTokensBf16 = 8;
inline constexpr bool kFloatInputsFirst = false;
inline constexpr int kAttentionVectors = 24;
inline constexpr int kAttentionBlock = 8;

/// A mask of the lanes below n; n may lie outside [0, 16].
inline __mmask16 lanes_below(int n) {
  n = n < 0 ? 0 : n > kLanes ? kLanes : n;
  return static_cast<__mmask16>((1u << n) - 1u);
}
inline __m512 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_below(n), p); }
inline Vec load_n(const bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(lanes_below(n), p));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, lanes_below(n), v); }

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

inline constexpr __mmask16 kHighHalf = 0xff00;
inline Vec load_halves(const float* low, const float* high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
inline Vec join_halves(Vec low, Vec high) { return _mm512_mask_blend_ps(kHighHalf, low, high); }
inline void store_low_half(float* p, Vec v) { _mm256_storeu_ps(p, _mm512_castps512_ps256(v)); }
inline void store_high_half(float* p, Vec v) { _mm256_storeu_ps(p, _mm512_extractf32x8_ps(v, 1)); }
/// 32 bytes in both halves.
inline __m512i load_twice(const void* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

inline Vec exponent_from_bits(Vec v, std::uint32_t bias) {
  __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(static_cast<int>(bias))));
}

inline Vec keep_range(Vec v, int begin, int end, float other) {
  auto inside = static_cast<__mmask16>(lanes_below(end) & ~lanes_below(begin));
  return _mm512_mask_blend_ps(inside, _mm512_set1_ps(other), v);
}
inline std::uint32_t equal_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline std::uint32_t greater_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline std::uint32_t at_least_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

// Compressed in registers: vpcompress to memory is an order of magnitude slower on Zen 4.
inline void compress(const float* from, std::uint32_t bits, float* to) {
  auto mask = static_cast<__mmask16>(bits);
  Vec packed = _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, from));
  store_n(to, packed, __builtin_popcount(bits));
}
inline void compress(const std::int32_t* from, std::uint32_t bits, std::int32_t* to) {
  auto mask = static_cast<__mmask16>(bits);
  __m512i packed = _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, from));
  _mm512_mask_storeu_epi32(to, lanes_below(__builtin_popcount(bits)), packed);
}
inline void compress_index(int first, std::uint32_t bits, std::int32_t* to) {
  __m512i index =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), index);
  _mm512_mask_storeu_epi32(to, lanes_below(__builtin_popcount(bits)), packed);
}

inline float reduce_add(Vec v) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float reduce_max(Vec v) {
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

}  // namespace
}  // namespace deinfer::cpu

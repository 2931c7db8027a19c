// bf16 arithmetic for AVX-512 without the BF16 extension: the same results by integer rounding and
// two fused multiply-adds per pair.
#pragma once

#include "kernels/cpu/simd_avx512.h"

namespace deinfer::cpu {
namespace {

inline __m256i narrow(Vec v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i high = _mm512_srli_epi32(u, 16);
  __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, quiet));
}
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store_n(bf16* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), narrow(v));
}

using Pairs = Vec;
inline constexpr int kPairPhases = 2;

template <int kPhase>
inline Pairs elements_of(__m512i pairs) {
  return _mm512_castsi512_ps(kPhase == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(-65536))
                                         : _mm512_slli_epi32(pairs, 16));
}
template <int kPhase>
inline Pairs load_pairs(const bf16* p) {
  return elements_of<kPhase>(_mm512_loadu_si512(p));
}
template <int kPhase>
inline Pairs broadcast_pair(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return elements_of<kPhase>(_mm512_set1_epi32(pair));
}
inline Vec pair_dot(Vec acc, Pairs w, Pairs x) { return fma(w, x, acc); }

template <int kPhase>
inline Pairs load_pairs_twice(const bf16* p) {
  return elements_of<kPhase>(load_twice(p));
}

// A byte's sign goes to bit 31 and its magnitude m to the top mantissa bits of 128 + m, so that
// subtracting 128 leaves m exactly.
template <int kPhase>
inline Vec int8_elements(__m512i bytes, int half) {
  __m512i pick =
      _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, 0, 0, -1, -1, 2, 2, -1, -1, 4, 4, -1, -1, 6, 6));
  pick = _mm512_add_epi8(pick, _mm512_set1_epi32(((8 * half + 1 - kPhase) * 0x0101) << 16));
  __m512i value = _mm512_shuffle_epi8(bytes, pick);
  __m512i magnitude = _mm512_and_si512(value, _mm512_set1_epi32(0x007f0000));
  __m512 shifted = _mm512_castsi512_ps(_mm512_or_si512(magnitude, _mm512_set1_epi32(0x43000000)));
  __m512i sign = _mm512_and_si512(value, _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  __m512i unsigned_bits = _mm512_castps_si512(_mm512_sub_ps(shifted, _mm512_set1_ps(128.0f)));
  return _mm512_castsi512_ps(_mm512_or_si512(unsigned_bits, sign));
}
template <int kPhase>
inline void load_int8_pairs(const std::int8_t* p, Pairs (&out)[2]) {
  __m512i bytes = _mm512_loadu_si512(p);
  out[0] = int8_elements<kPhase>(bytes, 0);
  out[1] = int8_elements<kPhase>(bytes, 1);
}
inline void expand_int8(const std::int8_t* p, bf16* out) {
  __m512i bytes = _mm512_loadu_si512(p);
  for (int half = 0; half < 2; ++half) {
    __m512i odd = _mm512_castps_si512(int8_elements<0>(bytes, half));
    __m512i even = _mm512_castps_si512(int8_elements<1>(bytes, half));
    _mm512_storeu_si512(out + half * kPanelRows, _mm512_or_si512(odd, _mm512_srli_epi32(even, 16)));
  }
}

}  // namespace
}  // namespace deinfer::cpu

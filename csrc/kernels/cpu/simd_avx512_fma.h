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

}  // namespace
}  // namespace deinfer::cpu

// bf16 arithmetic by the AVX-512 BF16 instructions. They flush denormals; elsewhere the results
// equal those of simd_avx512_fma.h bit for bit.
#pragma once

#include "kernels/cpu/simd_avx512.h"

namespace deinfer::cpu {
namespace {

inline __m256i narrow(Vec v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
inline void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
inline void store_n(bf16* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, lanes_below(n), narrow(v));
}

using Pairs = __m512bh;
inline constexpr int kPairPhases = 1;

template <int kPhase>
inline Pairs load_pairs(const bf16* p) {
  return reinterpret_cast<Pairs>(_mm512_loadu_si512(p));
}
template <int kPhase>
inline Pairs broadcast_pair(const bf16* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<Pairs>(_mm512_set1_epi32(pair));
}
inline Vec pair_dot(Vec acc, Pairs w, Pairs x) { return _mm512_dpbf16_ps(acc, w, x); }

}  // namespace
}  // namespace deinfer::cpu

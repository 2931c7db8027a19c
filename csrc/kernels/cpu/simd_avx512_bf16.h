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

template <int kPhase>
inline Pairs load_pairs_twice(const bf16* p) {
  return reinterpret_cast<Pairs>(load_twice(p));
}
inline Pairs join_halves(Pairs low, Pairs high) {
  return reinterpret_cast<Pairs>(_mm512_mask_blend_epi32(kHighHalf, reinterpret_cast<__m512i>(low),
                                                         reinterpret_cast<__m512i>(high)));
}

/// The two bytes of the bf16 numbers 0 .. 127.
struct Bf16Bytes {
  constexpr Bf16Bytes() : low(), high() {
    for (int m = 1; m < 128; ++m) {
      int exponent = 31 - __builtin_clz(static_cast<unsigned>(m));
      int bits = ((127 + exponent) << 7) | ((m << (7 - exponent)) & 0x7f);
      low[m] = static_cast<unsigned char>(bits & 0xff);
      high[m] = static_cast<unsigned char>(bits >> 8);
    }
  }
  alignas(64) unsigned char low[128];
  alignas(64) unsigned char high[128];
};
inline constexpr Bf16Bytes kBf16Bytes;

template <int kPhase>
inline void load_int8_pairs(const std::int8_t* p, Pairs (&out)[2]) {
  __m512i bytes = _mm512_loadu_si512(p);
  auto look_up = [&](const unsigned char* table) {  // by the low 7 bits
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
  };
  __m512i low = look_up(kBf16Bytes.low);
  __m512i high = look_up(kBf16Bytes.high);
  constexpr int kAOrBAndC = 0xf8;
  high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), kAOrBAndC);
  out[0] = reinterpret_cast<Pairs>(_mm512_unpacklo_epi8(low, high));
  out[1] = reinterpret_cast<Pairs>(_mm512_unpackhi_epi8(low, high));
}
inline void expand_int8(const std::int8_t* p, bf16* out) {
  Pairs pairs[2];
  load_int8_pairs<0>(p, pairs);
  _mm512_storeu_si512(out, reinterpret_cast<__m512i>(pairs[0]));
  _mm512_storeu_si512(out + kPanelRows, reinterpret_cast<__m512i>(pairs[1]));
}

/// The 16 exponents of a compressed panel (compressed_panel.h), twice, as only the upper bits of an
/// index are ignored.
using Exponents = __m512i;
inline Exponents load_exponents(const std::uint16_t* p) { return load_twice(p); }
/// The four vectors of a unit.
inline void load_compressed(const std::byte* unit, Exponents exponents, Pairs (&out)[4]) {
  const __m512i kept[2] = {_mm512_loadu_si512(unit), _mm512_loadu_si512(unit + 64)};
  const __m512i codes = _mm512_loadu_si512(unit + 128);
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x807f807f));
  auto join = [&](__m512i code, __m512i rest) {
    constexpr int kAOrBAndC = 0xf8;
    const __m512i exponent = _mm512_permutexvar_epi16(code, exponents);
    return reinterpret_cast<Pairs>(_mm512_ternarylogic_epi32(exponent, rest, mask, kAOrBAndC));
  };
  out[0] = join(codes, kept[0]);
  out[1] = join(_mm512_srli_epi16(codes, 4), _mm512_rol_epi32(kept[0], 8));
  out[2] = join(_mm512_srli_epi16(codes, 8), kept[1]);
  out[3] = join(_mm512_srli_epi16(codes, 12), _mm512_rol_epi32(kept[1], 8));
}
/// Sets weight `place` of the 128.
inline void replace_weight(Pairs (&pairs)[4], std::uint32_t place, std::uint16_t bits) {
  const __m512i value = _mm512_set1_epi16(static_cast<short>(bits));
  for (std::uint32_t i = 0; i < 4; ++i) {
    const auto mask = static_cast<__mmask32>(place / 32 == i ? 1u << place % 32 : 0u);
    pairs[i] = reinterpret_cast<Pairs>(
        _mm512_mask_mov_epi16(reinterpret_cast<__m512i>(pairs[i]), mask, value));
  }
}
inline void store_pairs(bf16* out, const Pairs (&pairs)[4]) {
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * kPanelRows, reinterpret_cast<__m512i>(pairs[i]));
  }
}

}  // namespace
}  // namespace deinfer::cpu

// int8 and compressed weights as registers of 8 floats, for AVX2, where widening them costs more
// than multiplying them: every weight is widened once for all tokens of a pass, and of what two
// weights share, such as their sign's byte, nothing is computed twice.
#pragma once

#include "kernels/cpu/compressed_panel.h"
#include "kernels/cpu/expanded_impl.h"

namespace deinfer::cpu {
namespace {

/// f(column, row, weights) for the 64 weights of an int8 step, 8 rows from `row` on at a time; of
/// its 2 columns the odd one, as column 0, comes first for each row, as in the expanded inputs.
template <typename F>
[[gnu::always_inline]] inline void visit_int8(const std::int8_t* p, F f) {
  // A byte 128 + q below the byte 0x4b and two zeros is the float 2^23 + 128 + q.
  const __m256i exponents = _mm256_set1_epi8(0x4b);
  const __m256 offset = _mm256_set1_ps(8388608.0f + 128.0f);
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part);
    const __m256i magnitudes = _mm256_and_si256(bytes, _mm256_set1_epi8(127));
    const __m256i biased =
        _mm256_add_epi8(_mm256_sign_epi8(magnitudes, bytes), _mm256_set1_epi8(-128));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i source = half == 0 ? _mm256_unpacklo_epi64(biased, exponents)
                                       : _mm256_unpackhi_epi64(biased, exponents);
#pragma GCC unroll 2
      for (int column = 0; column < 2; ++column) {
        const int first = (1 - column) | 0x08808000;
        const __m256i pick =
            _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        const __m256 weights = _mm256_castsi256_ps(_mm256_shuffle_epi8(source, pick));
        f(column, 16 * half + 8 * part, _mm256_sub_ps(weights, offset));
      }
    }
  }
}

/// The 16 exponents of a compressed panel by byte, in both halves.
struct Exponents {
  explicit Exponents(const std::uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i bytes = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                            _mm256_srli_epi16(words, 8)),
        0xd8);
    low = _mm256_permute2x128_si256(bytes, bytes, 0x00);
    high = _mm256_permute2x128_si256(bytes, bytes, 0x11);
  }
  __m256i low;
  __m256i high;
};

/// f(column, row, weights) for the 128 weights of a unit (compressed_panel.h), in the same manner:
/// columns 0 and 1, then 2 and 3 are the odd and the even one of a pair.
template <typename F>
[[gnu::always_inline]] inline void visit_unit(const std::byte* unit, const Exponents& exponents,
                                              F f) {
  const __m256i signs_and_mantissas = _mm256_set1_epi32(static_cast<int>(0x807f807f));
  const __m256i nibbles = _mm256_set1_epi8(0x0f);
  const __m256i rotate = _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3,
                                          0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
  const auto* words = reinterpret_cast<const __m256i*>(unit);
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m256i codes = _mm256_loadu_si256(words + 4 + part);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // the vectors v0 and v2, then v1 and v3
      const __m256i code =
          _mm256_and_si256(half == 0 ? codes : _mm256_srli_epi16(codes, 4), nibbles);
      const __m256i low = _mm256_shuffle_epi8(exponents.low, code);
      const __m256i high = _mm256_shuffle_epi8(exponents.high, code);
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        const __m256i byte = _mm256_set1_epi16(0x00ff);
        const __m256i exponent =
            pair == 0 ? _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi16(high, 8))
                      : _mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(byte, high));
        __m256i kept = _mm256_loadu_si256(words + 2 * pair + part);
        if (half == 1) kept = _mm256_shuffle_epi8(kept, rotate);
        const __m256i weights =
            _mm256_or_si256(exponent, _mm256_and_si256(kept, signs_and_mantissas));
        f(2 * pair, 16 * half + 8 * part, elements_of<0>(weights));
        f(2 * pair + 1, 16 * half + 8 * part, elements_of<1>(weights));
      }
    }
  }
}

/// sums += the weights of a visit times x, the expanded inputs of token 0 in its first column.
template <int kTokens>
struct MultiplyVisited {
  const float* x;
  std::ptrdiff_t ldx;
  Sums<kPanelHalves, kTokens>& sums;
  [[gnu::always_inline]] void operator()(int column, int row, __m256 weights) const {
    __m256 Vec::* half = row % kLanes == 0 ? &Vec::lo : &Vec::hi;
#pragma GCC unroll 2
    for (int i = 0; i < kTokens; ++i) {
      __m256& sum = sums.vec[i][row / kLanes].*half;
      sum = _mm256_fmadd_ps(weights, _mm256_broadcast_ss(x + i * ldx + column), sum);
    }
  }
};

/// Writes the weights of a visit as expand_steps does.
struct StoreVisited {
  float* out;
  [[gnu::always_inline]] void operator()(int column, int row, __m256 weights) const {
    _mm256_storeu_ps(out + column * kPanelRows + row, weights);
  }
};

inline constexpr int kVisitTokens = 2;  // their sums and what a visit holds fill the registers

inline void fetch_ahead(const void* weights, int bytes) {
  for (int line = 0; line < bytes; line += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(weights) + kPrefetchAhead + line, 0, 2);
  }
}

template <int kTokens>
[[gnu::noinline]] void int8_kernel(const float* x, std::ptrdiff_t ldx, const std::int8_t* w,
                                   int steps, bool first, float* c) {
  Sums<kPanelHalves, kTokens> sums;
  load_sums(c, first, sums);
  for (int step = 0; step < steps; ++step, w += 2 * kPanelRows, x += 2) {
    fetch_ahead(w, 2 * kPanelRows);
    visit_int8(w, MultiplyVisited<kTokens>{x, ldx, sums});
  }
  store_sums(sums, c);
}

/// The outliers of unit `index` in the unit's expanded weights; returns the next ones.
inline const Outlier* replace_outliers(const Outlier* outlier, int index, float* weights) {
  for (; unit_of(*outlier) == index; ++outlier) {
    const int place = static_cast<int>(outlier->place) % kUnitWeights;
    const int column = place / (2 * kPanelRows) * 2 + (1 - place % 2);
    const std::uint32_t bits = std::uint32_t{outlier->bits} << 16;
    __builtin_memcpy(weights + column * kPanelRows + place / 2 % kPanelRows, &bits, sizeof bits);
  }
  return outlier;
}

/// The units [begin, end), of which `unit` is the first; `outlier` is the first of these or later.
template <int kTokens>
[[gnu::noinline]] void unit_kernel(const float* x, std::ptrdiff_t ldx, const std::byte* unit,
                                   const Exponents& exponents, const Outlier* outlier, int begin,
                                   int end, bool first, float* c) {
  Sums<kPanelHalves, kTokens> sums;
  load_sums(c, first, sums);
  for (int index = begin; index < end; ++index, unit += kUnitBytes, x += kUnitColumns) {
    fetch_ahead(unit, kUnitBytes);
    if (index != unit_of(*outlier)) [[likely]] {
      visit_unit(unit, exponents, MultiplyVisited<kTokens>{x, ldx, sums});
      continue;
    }
    alignas(64) float weights[kUnitWeights];
    visit_unit(unit, exponents, StoreVisited{weights});
    outlier = replace_outliers(outlier, index, weights);
    for (int column = 0; column < kUnitColumns; ++column) {
      add_inputs_first<DotF32, 0>(x + column, ldx, weights + column * kPanelRows, sums);
    }
  }
  store_sums(sums, c);
}

inline void panel_gemm_visited_int8(const float* x, int m, const std::int8_t* panel,
                                    const float* scale, int k_pad, const void* next, bool add,
                                    float* c) {
  if (m > kVisitTokens) {
    multiply_expanded<kPanelHalves>(
        x, m, k_pad, add,
        [&](int first, int count, float* out) -> const void* {
          const std::int8_t* w = panel + std::ptrdiff_t{first} * kPanelRows;
          for (int column = 0; column < count; column += 2) {
            visit_int8(w + column * kPanelRows, StoreVisited{out + column * kPanelRows});
          }
          return first + count == k_pad ? next : w + count * kPanelRows;
        },
        c);
  } else {
    auto* kernel = m == 1 ? int8_kernel<1> : int8_kernel<2>;
    kernel(x, k_pad, panel, k_pad / 2, !add, c);
  }
  if (scale != nullptr) scale_columns(scale, m, c);
}

inline void panel_gemm_expanded_compressed(const float* x, int m, const std::byte* panel, int k_pad,
                                           int k_begin, int k_end, const void* next, float* c) {
  const auto* header = reinterpret_cast<const PanelHeader*>(panel);
  const Exponents exponents(header->exponents);
  const std::byte* units = panel + compressed_offset(k_pad, k_begin);
  const int begin = k_begin / kUnitColumns;
  const int end = k_end / kUnitColumns;  // two columns may be left
  const int k = k_end - k_begin;
  const bool add = k_begin > 0;
  const Outlier* outlier = header->outliers();
  while (unit_of(*outlier) < begin) ++outlier;
  const auto* tail =
      reinterpret_cast<const bf16*>(units + std::ptrdiff_t{end - begin} * kUnitBytes);
  if (m > kVisitTokens) {
    return multiply_expanded<kPanelHalves>(
        x, m, k, add,
        [&](int first, int count, float* out) -> const void* {
          const int last = (first + count) / kUnitColumns;
          for (int i = first / kUnitColumns; i < last; ++i, out += kUnitWeights) {
            visit_unit(units + std::ptrdiff_t{i} * kUnitBytes, exponents, StoreVisited{out});
            outlier = replace_outliers(outlier, begin + i, out);
          }
          if (count % kUnitColumns != 0) expand_steps<kPanelHalves>(tail, 1, out);
          return first + count == k ? next : units + std::ptrdiff_t{last} * kUnitBytes;
        },
        c);
  }
  auto* kernel = m == 1 ? unit_kernel<1> : unit_kernel<2>;
  kernel(x, k, units, exponents, outlier, begin, end, !add, c);
  if (k_end % kUnitColumns != 0) {
    multiply_chunk<DotExpanded, kPanelHalves>(x + k - 2, k, m, tail, 1, false, nullptr, 0, c);
  }
}

/// The same of inputs that are not expanded: of so many tokens and columns at a time.
inline void panel_gemm_compressed(const bf16* x, std::ptrdiff_t ldx, int m, const std::byte* panel,
                                  int k_pad, int k_begin, int k_end, const void* next, float* c) {
  constexpr int kTokens = 16;
  constexpr int kColumns = 512;
  alignas(64) float inputs[kTokens * kColumns];
  for (int token = 0; token < m; token += kTokens) {
    const int count = m - token < kTokens ? m - token : kTokens;
    for (int first = k_begin; first < k_end; first += kColumns) {
      const int last = k_end - first < kColumns ? k_end : first + kColumns;
      expand_inputs(x + token * ldx + (first - k_begin), ldx, count, last - first, inputs);
      panel_gemm_expanded_compressed(inputs, count, panel, k_pad, first, last, next,
                                     c + std::ptrdiff_t{token} * kPanelRows);
    }
  }
}

}  // namespace
}  // namespace deinfer::cpu

// Tokens times one panel of compressed weights (compressed_panel.h), which are expanded in
// registers. The products are those of panel_gemm_bf16, in the same order: the same bits.
#pragma once

#include "kernels/cpu/compressed_panel.h"

namespace deinfer::cpu {
namespace {

// Measured on Zen 4: as kPrefetchMinTokens.
inline constexpr int kCompressedPrefetchTokens = 3;
inline constexpr int kUnitLines = kUnitBytes / kLineBytes;

/// What a pass does besides: nothing, fetch what comes later, or that and write the weights as
/// bf16.
enum class Aside { kNothing, kPrefetch, kKeep };

/// kTokens tokens times the units [begin, end), of which `unit` is the first, as micro_kernel;
/// `outlier` is the first of these or later ones. kKeep: kept[end - begin] = the weights.
template <int kTokens, Aside kAside>
[[gnu::noinline]] void compressed_kernel(const bf16* x, std::ptrdiff_t ldx, const std::byte* unit,
                                         const std::uint16_t* exponents, const Outlier* outlier,
                                         int begin, int end, bf16* kept, float* c) {
  const Exponents table = load_exponents(exponents);
  Sums<kPanelHalves, kTokens> sums;
  load_sums(c, begin == 0, sums);
  for (int index = begin; index < end; ++index, unit += kUnitBytes, x += kUnitColumns) {
    asm volatile("" : "+r"(x) : : "memory");  // as add_step
    if constexpr (kAside != Aside::kNothing) {
#pragma GCC unroll 3
      for (int line = 0; line < kUnitLines; ++line) {
        __builtin_prefetch(unit + kPrefetchAhead + line * kLineBytes, 0, 2);
      }
    }
    Pairs weights[4];
    load_compressed(unit, table, weights);
    if (index == unit_of(*outlier)) [[unlikely]] {
      for (; index == unit_of(*outlier); ++outlier) {
        replace_weight(weights, outlier->place % kUnitWeights, outlier->bits);
      }
    }
    if constexpr (kAside == Aside::kKeep) {
      store_pairs(kept, weights);
      kept += kUnitWeights;
    }
#pragma GCC unroll 2
    for (int step = 0; step < 2; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < kTokens; ++i) {
        const Pairs input = broadcast_pair<0>(x + i * ldx + step * 2);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          sums.vec[i][j] = pair_dot(sums.vec[i][j], weights[2 * step + j], input);
        }
      }
    }
  }
  store_sums(sums, c);
}

template <bool kKeep, int kTokens = kGemmTokensBf16>
auto* compressed_kernel_for(int tokens) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return compressed_kernel_for<kKeep, kTokens - 1>(tokens);
  }
  constexpr Aside kAlone = kTokens < kCompressedPrefetchTokens ? Aside::kNothing : Aside::kPrefetch;
  return compressed_kernel < kTokens, kKeep ? Aside::kKeep : kAlone > ;
}

/// The passes after that, which fetch the units of the next chunk, from `next` on.
inline void multiply_kept(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* kept, int steps,
                          bool first, const void* next, float* c) {
  const int passes = (m + kGemmTokensBf16 - 1) / kGemmTokensBf16;
  const int lines = next == nullptr ? 0 : passes == 1 ? 2 : 1;  // of 1.5 per step
  const auto* prefetch = static_cast<const char*>(next);
  for (int pass = 0; pass < passes; ++pass) {
    const int token = static_cast<int>(std::int64_t{m} * pass / passes);
    const int tokens = static_cast<int>(std::int64_t{m} * (pass + 1) / passes) - token;
    auto* kernel = micro_kernel_for<DotBf16, kPanelHalves>(tokens, pass < 2 ? lines : 0);
    kernel(x + token * ldx, ldx, kept, steps, first, prefetch,
           c + std::ptrdiff_t{token} * kPanelRows);
    prefetch += std::ptrdiff_t{steps} * lines * kLineBytes;
  }
}

/// The columns [k_begin, k_end) of a panel, which begins with `panel`; x is at column k_begin.
/// Of several passes the first expands the weights, chunk by chunk, into memory that stays in L2.
inline void panel_gemm_compressed(const bf16* x, std::ptrdiff_t ldx, int m, const std::byte* panel,
                                  int k_pad, int k_begin, int k_end, const void* next, float* c) {
  const auto* header = reinterpret_cast<const PanelHeader*>(panel);
  const std::byte* unit = panel + compressed_offset(k_pad, k_begin);
  const Outlier* outlier = header->outliers();
  int begin = k_begin / kUnitColumns;
  const int end = k_end / kUnitColumns;  // two columns may be left
  auto advance = [&](int to) {
    unit += std::ptrdiff_t{to - begin} * kUnitBytes;
    x += std::ptrdiff_t{to - begin} * kUnitColumns;
    while (unit_of(*outlier) < to) ++outlier;
    begin = to;
  };
  advance(begin);
  if (m <= kGemmTokensBf16) {
    compressed_kernel_for<false>(m)(x, ldx, unit, header->exponents, outlier, begin, end, nullptr,
                                    c);
    advance(end);
  } else {
    constexpr int kChunk = kChunkSteps / 2;
    alignas(64) bf16 kept[std::ptrdiff_t{kChunk} * kUnitWeights];
    const int passes = (m + kGemmTokensBf16 - 1) / kGemmTokensBf16;
    const int tokens = m / passes;  // of the first pass; the others are balanced
    auto* kernel = compressed_kernel_for<true>(tokens);
    while (begin < end) {
      const int stop = end - begin < kChunk ? end : begin + kChunk;
      kernel(x, ldx, unit, header->exponents, outlier, begin, stop, kept, c);
      const void* after = stop == end ? next : unit + std::ptrdiff_t{stop - begin} * kUnitBytes;
      multiply_kept(x + tokens * ldx, ldx, m - tokens, kept, 2 * (stop - begin), begin == 0, after,
                    c + std::ptrdiff_t{tokens} * kPanelRows);
      advance(stop);
    }
  }
  if (k_end % kUnitColumns != 0) {
    multiply_chunk<DotBf16, kPanelHalves>(x, ldx, m, reinterpret_cast<const bf16*>(unit), 1,
                                          end == 0, nullptr, 0, c);
  }
}

}  // namespace
}  // namespace deinfer::cpu

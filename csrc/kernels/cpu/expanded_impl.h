// Tokens times one panel where bf16 is multiplied as fp32: for many tokens both sides are widened
// beforehand, the inputs once for all panels of a product and the weights once for all tokens,
// instead of by every pass of panel_gemm_bf16. The products are the same, in the same order: the
// same bits.
#pragma once

#include "kernels/cpu/gemm_impl.h"

namespace deinfer::cpu {
namespace {

/// Few tokens do not repay the expansion of the weights, which are then widened in registers.
/// Measured on Zen 3.
inline constexpr int kExpandWeightsTokens = 32;

/// Of a chunk of expanded weights, whose 24 KiB stay in L1 while the tokens pass.
inline constexpr int kExpandedColumns = 192;

/// Columns that lie side by side in the expanded inputs of m tokens; those of all tokens follow one
/// another, then come the next so many.
inline int expanded_chunk(int m, int k) { return m < kExpandWeightsTokens ? k : kExpandedColumns; }

inline std::ptrdiff_t expanded_inputs_size(int m, int k) {
  const int padded = (k + kExpandedColumns - 1) / kExpandedColumns * kExpandedColumns;
  return std::ptrdiff_t{m} * padded;
}

/// Columns as they are multiplied: of each pair the odd one first.
inline void expand_inputs(const bf16* x, std::ptrdiff_t ldx, int m, int k, float* out) {
  const int chunk = expanded_chunk(m, k);
  for (int first = 0; first < k; first += chunk) {
    const int count = k - first < chunk ? k - first : chunk;
    for (int i = 0; i < m; ++i, out += chunk) {
      const bf16* row = x + i * ldx + first;
      int j = 0;
      for (; j + kLanes <= count; j += kLanes) store(out + j, swap_pairs(load(row + j)));
      if (j < count) store_n(out + j, swap_pairs(load_n(row + j, count - j)), count - j);
    }
  }
}

/// Expanded inputs and bf16 weights.
struct DotExpanded : DotBf16 {
  using Element = float;
  using Operand = Vec;
  static constexpr int kMaxTokens = kGemmTokensF32;
  static constexpr bool kInputsFirst = true;
  template <int kPhase>
  static Vec input(const float* x) {
    return broadcast(x[kPhase]);
  }
};

template <>
inline constexpr int kPrefetchMinTokens<DotExpanded> = 1;  // measured on Zen 3

/// Steps of bf16 weights of kHalves * 8 rows: out[2 * steps][rows].
template <int kHalves>
void expand_steps(const bf16* w, int steps, float* out) {
  constexpr int kRows = kHalves * kHalfLanes;
  for (int step = 0; step < steps; ++step, w += 2 * kRows, out += 2 * kRows) {
    for (int row = 0; row + kLanes <= kRows; row += kLanes) {
      store(out + row, load_pairs<0>(w + 2 * row));
      store(out + kRows + row, load_pairs<1>(w + 2 * row));
    }
    if constexpr (kHalves % 2 == 1) {
      constexpr int kRow = kRows - kHalfLanes;
      store_low_half(out + kRow, load_pairs_twice<0>(w + 2 * kRow));
      store_low_half(out + kRows + kRow, load_pairs_twice<1>(w + 2 * kRow));
    }
  }
}

/// The kernel for `tokens` tokens, of 1 to kTokens, which fetches a line in every `every`-th step,
/// or none where that is 0.
template <int kHalves, int kTokens = DotF32::kMaxTokens>
auto* expanded_kernel_for(int tokens, int every) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return expanded_kernel_for<kHalves, kTokens - 1>(tokens, every);
  }
  switch (every) {
    case 0: return micro_kernel<DotF32, kHalves, kTokens, 0>;
    case 1: return micro_kernel<DotF32, kHalves, kTokens, 1>;
    case 2: return micro_kernel<DotF32, kHalves, kTokens, 1, 2>;
    default: return micro_kernel<DotF32, kHalves, kTokens, 1, 4>;
  }
}

/// c = x . panel^T, or on top of c with `add`. expand(first, count, out) writes the weights of
/// `count` columns from `first` on as expand_steps does, and returns where the next ones lie, which
/// have at most a line per column.
template <int kHalves, typename Expand>
void multiply_expanded(const float* x, int m, int k, bool add, Expand expand, float* c) {
  constexpr int kTokens = DotF32::kMaxTokens;
  alignas(64) float weights[kExpandedColumns * kHalves * kHalfLanes];
  const int passes = (m + kTokens - 1) / kTokens;
  const int every = passes >= 4 ? 4 : passes >= 2 ? 2 : 1;  // spread over that many passes
  const int ldx = expanded_chunk(m, k);
  for (int first = 0; first < k; first += kExpandedColumns) {
    const float* inputs = x + (ldx == k ? first : std::ptrdiff_t{m} * first);
    const int count = k - first < kExpandedColumns ? k - first : kExpandedColumns;
    const auto* next = static_cast<const char*>(expand(first, count, weights));
    for (int pass = 0; pass < passes; ++pass) {
      const int token = static_cast<int>(std::int64_t{m} * pass / passes);
      const int tokens = static_cast<int>(std::int64_t{m} * (pass + 1) / passes) - token;
      const bool fetches = next != nullptr && pass < every;
      const char* prefetch =
          fetches ? next + std::ptrdiff_t{pass} * (kExpandedColumns / every) * kLineBytes : nullptr;
      auto* kernel = expanded_kernel_for<kHalves>(tokens, fetches ? every : 0);
      kernel(inputs + std::ptrdiff_t{token} * ldx, ldx, weights, count, !add && first == 0,
             prefetch, c + std::ptrdiff_t{token} * kPanelRows);
    }
  }
}

template <int kHalves>
void multiply_expanded_bf16(const float* x, int m, const bf16* panel, int k_pad, const void* next,
                            bool add, float* c) {
  if (m < kExpandWeightsTokens) {
    auto* product = add ? multiply_panel<DotExpanded, kHalves, true>
                        : multiply_panel<DotExpanded, kHalves, false>;
    return product(x, k_pad, m, panel, k_pad, next, c);
  }
  multiply_expanded<kHalves>(
      x, m, k_pad, add,
      [&](int first, int count, float* out) -> const void* {
        const bf16* w = panel + std::ptrdiff_t{first} * kHalves * kHalfLanes;
        expand_steps<kHalves>(w, count / 2, out);
        return first + count == k_pad ? next : w + count * kHalves * kHalfLanes;
      },
      c);
}

inline void panel_gemm_expanded_bf16(const float* x, int m, const bf16* panel, int rows, int k_pad,
                                     const void* next, bool add, float* c) {
  switch (rows / kHalfLanes) {
    case 1: return multiply_expanded_bf16<1>(x, m, panel, k_pad, next, add, c);
    case 2: return multiply_expanded_bf16<2>(x, m, panel, k_pad, next, add, c);
    case 3: return multiply_expanded_bf16<3>(x, m, panel, k_pad, next, add, c);
    default: return multiply_expanded_bf16<kPanelHalves>(x, m, panel, k_pad, next, add, c);
  }
}

inline void panel_gemm_expanded_int8(const float* x, int m, const std::int8_t* panel,
                                     const float* scale, int k_pad, const void* next, bool add,
                                     float* c) {
  multiply_expanded<kPanelHalves>(
      x, m, k_pad, add,
      [&](int first, int count, float* out) -> const void* {
        const std::int8_t* w = panel + std::ptrdiff_t{first} * kPanelRows;
        for (int column = 0; column < count; column += 2) {
          const std::int8_t* step = w + column * kPanelRows;
          float* to = out + column * kPanelRows;
          Pairs pairs[2];
          load_int8_pairs<0>(step, pairs);
          store(to, pairs[0]);
          store(to + kLanes, pairs[1]);
          load_int8_pairs<1>(step, pairs);
          store(to + kPanelRows, pairs[0]);
          store(to + kPanelRows + kLanes, pairs[1]);
        }
        return first + count == k_pad ? next : w + count * kPanelRows;
      },
      c);
  if (scale != nullptr) scale_columns(scale, m, c);
}

/// The table with these products, of which an instruction set may have its own of int8 weights.
constexpr KernelTable with_expanded(KernelTable table,
                                    decltype(KernelTable::panel_gemm_expanded_int8) int8_product) {
  table.expand_inputs = expand_inputs;
  table.expanded_inputs_size = expanded_inputs_size;
  table.panel_gemm_expanded_bf16 = panel_gemm_expanded_bf16;
  table.panel_gemm_expanded_int8 = int8_product;
  return table;
}

}  // namespace
}  // namespace deinfer::cpu

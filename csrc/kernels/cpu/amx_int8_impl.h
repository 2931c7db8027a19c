// Tokens times one panel of packed int8 weights by AMX tiles: panel_gemm_int8 of kernel_table.h.
//
// A step of weights is expanded to bf16 one step before it is multiplied, so that the vector unit
// reads and expands memory while the tiles multiply. What is expanded stays in L1 for the other
// blocks of tokens, chunk by chunk; sums are in c meanwhile. Order and bits are those of the bf16
// product of the same integers (amx_gemm_impl.h).
#pragma once

#include "kernels/cpu/amx_gemm_impl.h"

namespace deinfer::cpu {
namespace {

inline constexpr int kPairWeights = 2 * kPanelRows;  // of a pair of k
inline constexpr int kStepPairs = kTileK / 2;
// Beyond the reach of the hardware's streamer, which stops at pages.
inline constexpr int kAmxInt8PrefetchAhead = 8192;

/// Some steps of a panel as bf16.
struct ExpandedChunk {
  alignas(64) bf16 step[kAmxChunkSteps][kTileK * kPanelRows];

  /// Expands `pairs` pairs of k from w on; the rest of the step is zero.
  template <typename Tiles>
  void expand(Tiles& tiles, const std::int8_t* w, int pairs, int to) {
    for (int pair = 0; pair < pairs; ++pair) {
      tiles.prefetch(w + pair * kPairWeights + kAmxInt8PrefetchAhead);
      tiles.expand(w + pair * kPairWeights, step[to] + pair * kPairWeights);
    }
    if (pairs < kStepPairs) {
      __builtin_memset(step[to] + pairs * kPairWeights, 0,
                       static_cast<std::size_t>(kStepPairs - pairs) * kPairWeights * sizeof(bf16));
    }
  }
};

template <bool kAdd, typename Tiles>
class AmxInt8Panel {
 public:
  AmxInt8Panel(Tiles& tiles, const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
               int k_pad, float* c)
      : tiles_(tiles),
        x_(x),
        ldx_(ldx),
        panel_(panel),
        c_(c),
        m_(m),
        tokens_(m < kTileRows ? m : kTileRows),
        k_pad_(k_pad),
        steps_((k_pad + kTileK - 1) / kTileK) {}

  /// m is up to kBlockTokens, or a multiple of it.
  void multiply() {
    tiles_.configure(kTileConfigs.of[tokens_][kPanelRows / kHalfTile]);
    for (int step = 0; step < steps_; step += kAmxChunkSteps) {
      const int count = steps_ - step < kAmxChunkSteps ? steps_ - step : kAmxChunkSteps;
      for (int first = 0; first < m_; first += kBlockTokens) {
        if (step == 0 && !kAdd) {
          run<false>(first, step, count);
        } else {
          run<true>(first, step, count);
        }
      }
    }
    tiles_.release();
  }

 private:
  static constexpr std::ptrdiff_t kPairBytes = kPairWeights * sizeof(bf16);

  void expand(int step) {
    const int pairs = (k_pad_ - step * kTileK) / 2;
    chunk_.expand(tiles_, panel_ + std::ptrdiff_t{step} * kTileK * kPanelRows,
                  pairs < kStepPairs ? pairs : kStepPairs, step % kAmxChunkSteps);
  }

  template <bool kOnTop>
  void run(int first, int step, int count) {
    if (m_ - first > kTileRows) {
      run_tiles<2, kOnTop>(first, step, count);
    } else {
      run_tiles<1, kOnTop>(first, step, count);
    }
  }

  template <int kTokenTiles, bool kOnTop>
  void run_tiles(int first, int step, int count) {
    // Tokens of both tiles have the same sums in both, so that either may be stored last.
    const int second = m_ - first < kBlockTokens ? m_ - kTileRows : first + kTileRows;
    float* c0 = c_ + std::ptrdiff_t{first} * kPanelRows;
    float* c1 = c_ + std::ptrdiff_t{second} * kPanelRows;
    begin_sums<kTileC, 2, kOnTop>(tiles_, c0);
    if constexpr (kTokenTiles == 2) begin_sums<kTileC + 2, 2, kOnTop>(tiles_, c1);
    if (first == 0) expand(step);
    for (int s = 0; s < count; ++s) {
      if (first == 0 && s + 1 < count) expand(step + s + 1);
      multiply_at<kTokenTiles>(first, second, step + s, chunk_.step[s]);
    }
    end_sums<kTileC, 2>(tiles_, c0);
    if constexpr (kTokenTiles == 2) end_sums<kTileC + 2, 2>(tiles_, c1);
  }

  template <int kTokenTiles>
  void multiply_at(int first, int second, int step, const bf16* w) {
    const std::ptrdiff_t k = std::ptrdiff_t{step} * kTileK;
    const bf16* x0 = x_ + first * ldx_ + k;
    const bf16* x1 = x_ + second * ldx_ + k;
    std::ptrdiff_t row_bytes = ldx_ * static_cast<std::ptrdiff_t>(sizeof(bf16));
    const int left = k_pad_ - step * kTileK;
    if (left < kTileK) {
      load_tail_tokens(tiles_, x0, ldx_, tokens_, left, tail_x_);
      if constexpr (kTokenTiles == 2) {
        load_tail_tokens(tiles_, x1, ldx_, tokens_, left, tail_x_ + kTileRows);
      }
      x0 = tail_x_[0];
      x1 = tail_x_[kTileRows];
      row_bytes = kTileBytes;
    }
    multiply_step<2, kTokenTiles>(tiles_, x0, x1, row_bytes, w, kPairBytes);
  }

  Tiles& tiles_;
  const bf16* x_;
  std::ptrdiff_t ldx_;
  const std::int8_t* panel_;
  float* c_;
  int m_;
  int tokens_;  // of a tile
  int k_pad_;
  int steps_;
  ExpandedChunk chunk_;
  alignas(64) bf16 tail_x_[kBlockTokens][kTileK];
};

/// panel_gemm_int8 without scales on `tiles`, which besides what amx_panel_gemm needs has
///   expand(const std::int8_t* from, bf16* to): a pair of k of a panel.
template <bool kAdd, typename Tiles>
void amx_panel_gemm_int8(Tiles& tiles, const bf16* x, std::ptrdiff_t ldx, int m,
                         const std::int8_t* panel, int k_pad, float* c) {
  const int whole = m > kBlockTokens ? m / kBlockTokens * kBlockTokens : m;
  if (whole > 0) AmxInt8Panel<kAdd, Tiles>(tiles, x, ldx, whole, panel, k_pad, c).multiply();
  if (whole == m) return;
  AmxInt8Panel<kAdd, Tiles>(tiles, x + whole * ldx, ldx, m - whole, panel, k_pad,
                            c + std::ptrdiff_t{whole} * kPanelRows)
      .multiply();
}

}  // namespace
}  // namespace deinfer::cpu

// Tokens times one panel of packed bf16 weights by AMX tiles: panel_gemm_bf16 of kernel_table.h.
//
// Prefetching and blocking are measured on a Xeon of family 6, model 167 (two cores, 2 MB of L2).
//
// A panel is stored as TDPBF16PS wants its second operand: a row of a tile of weights is one pair
// of k of 16 outputs. A step is 32 of k:
//   A: up to 16 tokens [tokens][16 pairs]    B: weights [16 pairs][16 outputs][2]
//   C: sums [tokens][16 outputs], two A times two B in a block
// Each output is one fp32 element of C that takes the steps in ascending order. A step adds to it,
// rounding each time, (sum over even k) + (sum over odd k), both chains of fused multiply-adds in
// ascending order from zero; denormals count as zero. Hence the bits differ from those of other
// instruction sets, but depend neither on m nor on the row of the tile: every m takes this path.
//
// - k_pad is a multiple of 2 only. What is left after whole steps is copied to tiles padded with
//   zeros, whose products add exactly nothing. A tile of another shape would need another tile
//   configuration, and loading one clears C.
// - Of a panel of 24 or 8 rows, the last tile of weights, and C, have half the columns.
// - m below 16 has tiles of m rows. From 16 on all tiles have 16 rows and the last begins at
//   m - 16: the tokens it shares with the one before get the same bits again. So one configuration
//   serves a call, where another would cost some 200 cycles and a fresh start of the pipeline;
//   repeated rows cost nothing while weights come from memory, and at most a tile's time else.
// - Tiles are configured and released in each call: some 200 cycles for a panel that takes
//   thousands. A thread may belong to the host program, whose other libraries configure tiles as
//   they like, so a configuration kept from the last call could be anybody's; and tiles in use are
//   8 KiB more to save in every context switch and keep an idle core from its deepest sleep.
// - Two tiles of tokens times two of weights take 4 KiB per step, which L1 delivers while they are
//   multiplied and L2 does not. So more than one block of tokens takes the panel in chunks that
//   stay in L1, its sums in c meanwhile.
//   That also stores tiles often: the first store after some 800 ns without one was measured to
//   take 290 ns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {

/// The operand of LDTILECFG, palette 1.
struct alignas(64) TileConfig {
  std::uint8_t palette;
  std::uint8_t start_row;
  std::uint8_t reserved[14];
  std::uint16_t row_bytes[16];  // of the tiles 0..7, then reserved
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

namespace {

// Tile registers. C of token tile i and output tile j is kTileC + 2 i + j.
inline constexpr int kTileC = 0;
inline constexpr int kTileA = 4;
inline constexpr int kTileB = 6;

inline constexpr int kTileRows = 16;
inline constexpr int kHalfTile = 8;    // columns of a half tile of C
inline constexpr int kTileBytes = 64;  // of a row
inline constexpr int kTileK = 32;      // of k per step
inline constexpr int kBlockTokens = 2 * kTileRows;
inline constexpr int kCacheLine = 64;
inline constexpr int kAmxPrefetchAhead = 8192;
inline constexpr int kAmxChunkSteps = 8;  // of a panel in L1: 16 KiB
// Of the next panel, fetched while this one is computed from L2; L2 holds both, and x.
inline constexpr int kAmxNextBytes = 256 << 10;

/// For tiles of `tokens` rows, and panels of `halves` * 8 rows.
constexpr TileConfig tile_config(int tokens, int halves) {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    const bool last = tile < kTileA || tile >= kTileB ? tile % 2 == (halves - 1) / 2 : false;
    config.row_bytes[tile] = last && halves % 2 == 1 ? kTileBytes / 2 : kTileBytes;
    config.rows[tile] = static_cast<std::uint8_t>(tile < kTileB ? tokens : kTileRows);
  }
  return config;
}

struct TileConfigs {
  TileConfig of[kTileRows + 1][kPanelRows / kHalfTile + 1];
};

constexpr TileConfigs make_tile_configs() {
  TileConfigs configs{};
  for (int tokens = 1; tokens <= kTileRows; ++tokens) {
    for (int halves = 1; halves <= kPanelRows / kHalfTile; ++halves) {
      configs.of[tokens][halves] = tile_config(tokens, halves);
    }
  }
  return configs;
}

inline constexpr TileConfigs kTileConfigs = make_tile_configs();

/// The tokens [first, first + rows of a tile) and [second, ...) times some steps of a panel.
struct AmxBlock {
  const bf16* x;  // at the first step
  std::ptrdiff_t ldx;
  int first;
  int second;
  const bf16* w;  // likewise
  int steps;
  float* c;
  // Prefetching: step s fetches `lines` lines from fetch + s * stride; beyond `end` they continue
  // at `after`, or end when that is null.
  const char* fetch;
  const char* end;
  const char* after;
  std::ptrdiff_t stride;
  int lines;
};

template <typename Tiles>
void prefetch_step(Tiles& tiles, const AmxBlock& block, std::ptrdiff_t step) {
  const char* at = block.fetch + step * block.stride;
  if (at >= block.end) {
    if (block.after == nullptr) return;
    at = block.after + (at - block.end);
  }
  for (int i = 0; i < block.lines; ++i) tiles.prefetch(at + i * kCacheLine);
}

/// C += A B for one step. a0 and a1 point at the tokens' pairs, lda bytes apart; b at the weights,
/// the pairs ldb bytes apart.
template <int kVecs, int kTokenTiles, typename Tiles>
void multiply_step(Tiles& tiles, const void* a0, const void* a1, std::ptrdiff_t lda, const bf16* b,
                   std::ptrdiff_t ldb) {
  tiles.template load<kTileB>(b, ldb);
  tiles.template load<kTileA>(a0, lda);
  tiles.template multiply<kTileC, kTileA, kTileB>();
  if constexpr (kVecs == 2) {
    tiles.template load<kTileB + 1>(b + 2 * kLanes, ldb);
    tiles.template multiply<kTileC + 1, kTileA, kTileB + 1>();
  }
  if constexpr (kTokenTiles == 2) {
    tiles.template load<kTileA + 1>(a1, lda);
    tiles.template multiply<kTileC + 2, kTileA + 1, kTileB>();
    if constexpr (kVecs == 2) tiles.template multiply<kTileC + 3, kTileA + 1, kTileB + 1>();
  }
}

/// The last k_pad % kTileK of k, padded with zeros.
template <int kRows>
struct AmxTail {
  int k = 0;  // of it
  alignas(64) bf16 x[kBlockTokens][kTileK];
  alignas(64) bf16 w[kTileK * kRows];
};

/// Copies what a tile of `tokens` rows reads of x into `rows`, zeros behind it.
template <typename Tiles>
void load_tail_tokens(Tiles& tiles, const bf16* x, std::ptrdiff_t ldx, int tokens, int count,
                      bf16 (*rows)[kTileK]) {
  for (int i = 0; i < tokens; ++i) tiles.copy_padded(x + i * ldx, count, rows[i], kTileK);
}

/// The sums of a tile of tokens, from zero or with kAdd from c.
template <int kTile, int kVecs, bool kAdd, typename Tiles>
void begin_sums(Tiles& tiles, const float* c) {
  constexpr std::ptrdiff_t kTokenBytes = kPanelRows * sizeof(float);
  if constexpr (kAdd) {
    tiles.template load<kTile>(c, kTokenBytes);
    if constexpr (kVecs == 2) tiles.template load<kTile + 1>(c + kLanes, kTokenBytes);
  } else {
    tiles.template zero<kTile>();
    if constexpr (kVecs == 2) tiles.template zero<kTile + 1>();
  }
}

template <int kTile, int kVecs, typename Tiles>
void end_sums(Tiles& tiles, float* c) {
  constexpr std::ptrdiff_t kTokenBytes = kPanelRows * sizeof(float);
  tiles.template store<kTile>(c, kTokenBytes);
  if constexpr (kVecs == 2) tiles.template store<kTile + 1>(c + kLanes, kTokenBytes);
}

/// With kTail after the block's steps the tail of k.
template <int kRows, int kTokenTiles, bool kAdd, bool kTail, typename Tiles>
void multiply_block(Tiles& tiles, const AmxBlock& block, int tokens, AmxTail<kRows>& tail) {
  constexpr int kVecs = (kRows + kLanes - 1) / kLanes;
  constexpr std::ptrdiff_t kPairBytes = kRows * 2 * sizeof(bf16);
  const bf16* x0 = block.x + block.first * block.ldx;
  const bf16* x1 = block.x + block.second * block.ldx;
  const bf16* w = block.w;
  const auto ldx = static_cast<std::ptrdiff_t>(block.ldx * static_cast<int>(sizeof(bf16)));
  float* c0 = block.c + std::ptrdiff_t{block.first} * kPanelRows;
  float* c1 = block.c + std::ptrdiff_t{block.second} * kPanelRows;
  begin_sums<kTileC, kVecs, kAdd>(tiles, c0);
  if constexpr (kTokenTiles == 2) begin_sums<kTileC + 2, kVecs, kAdd>(tiles, c1);
  for (int step = 0; step < block.steps; ++step) {
    prefetch_step(tiles, block, step);
    multiply_step<kVecs, kTokenTiles>(tiles, x0, x1, ldx, w, kPairBytes);
    x0 += kTileK;
    x1 += kTileK;
    w += kTileK * kRows;
  }
  if (kTail && tail.k > 0) {
    prefetch_step(tiles, block, block.steps);
    load_tail_tokens(tiles, x0, block.ldx, tokens, tail.k, tail.x);
    if constexpr (kTokenTiles == 2) {
      load_tail_tokens(tiles, x1, block.ldx, tokens, tail.k, tail.x + kTileRows);
    }
    multiply_step<kVecs, kTokenTiles>(tiles, tail.x[0], tail.x[kTileRows], kTileBytes, tail.w,
                                      kPairBytes);
  }
  end_sums<kTileC, kVecs>(tiles, c0);
  if constexpr (kTokenTiles == 2) end_sums<kTileC + 2, kVecs>(tiles, c1);
}

/// Tokens times one panel: its blocks, their prefetching and their tail of k.
template <int kRows, bool kAdd, typename Tiles>
class AmxPanel {
 public:
  AmxPanel(Tiles& tiles, const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int k_pad,
           const void* next, float* c)
      : tiles_(tiles),
        x_(x),
        ldx_(ldx),
        panel_(panel),
        next_(static_cast<const char*>(next)),
        c_(c),
        m_(m),
        tokens_(m < kTileRows ? m : kTileRows),
        steps_(k_pad / kTileK),
        blocks_((m + kBlockTokens - 1) / kBlockTokens) {
    tail_.k = k_pad % kTileK;
    if (tail_.k > 0) {
      tiles.copy_padded(panel + std::ptrdiff_t{k_pad - tail_.k} * kRows, tail_.k * kRows, tail_.w,
                        kTileK * kRows);
    }
  }

  void multiply() {
    tiles_.configure(kTileConfigs.of[tokens_][kRows / kHalfTile]);
    const int whole = blocks_ > 1 ? m_ / kBlockTokens : 0;
    int step = 0;
    do {  // once even where k is but a tail
      const int steps = steps_ - step < kAmxChunkSteps ? steps_ - step : kAmxChunkSteps;
      const bool last = step + steps == steps_;
      for (int index = 0; index < whole; ++index) run_chunk(index, step, steps, last);
      step += kAmxChunkSteps;
    } while (step < steps_);
    // The last tokens by themselves: what they share with a whole block is summed once more from
    // zero, not added to.
    if (whole < blocks_) run_all(whole);
    tiles_.release();
  }

 private:
  static constexpr int kStepLines = kTileK * kRows * static_cast<int>(sizeof(bf16)) / kCacheLine;
  static constexpr std::ptrdiff_t kStepBytes = std::ptrdiff_t{kStepLines} * kCacheLine;

  AmxBlock block_at(int index, int step, int steps) const {
    const int last = m_ - tokens_;
    const int first = index * kBlockTokens;
    const int second = first + kTileRows;
    AmxBlock block{};
    block.x = x_ + std::ptrdiff_t{step} * kTileK;
    block.ldx = ldx_;
    block.first = first < last ? first : last;
    block.second = second < last ? second : last;
    block.w = panel_ + std::ptrdiff_t{step} * kTileK * kRows;
    block.steps = steps;
    block.c = c_;
    block.stride = kStepBytes;
    if (blocks_ == 1 || (index == 0 && step * kStepBytes >= kAmxNextBytes)) {
      fetch_ahead(step, block);
    } else {
      fetch_next(index, step, block);
    }
    return block;
  }

  /// In the panel, and with one block then at the beginning of the next.
  void fetch_ahead(int step, AmxBlock& block) const {
    const auto* panel = reinterpret_cast<const char*>(panel_);
    const std::ptrdiff_t tail_bytes = std::ptrdiff_t{tail_.k} * kRows * 2;
    block.fetch = panel + step * kStepBytes + kAmxPrefetchAhead;
    block.end = panel + steps_ * kStepBytes + tail_bytes;
    block.after = blocks_ == 1 ? next_ : nullptr;
    block.lines = kStepLines;
  }

  /// Of the next panel, while this one is computed from L2: of what each step will read, a block
  /// fetches its part.
  void fetch_next(int index, int step, AmxBlock& block) const {
    const int lines = (kStepLines + blocks_ - 1) / blocks_;
    const int begin = index * lines;
    const int rest = kStepLines - begin;
    if (next_ == nullptr || rest <= 0 || step * kStepBytes >= kAmxNextBytes) return;
    block.lines = lines < rest ? lines : rest;
    block.fetch = next_ + step * kStepBytes + std::ptrdiff_t{begin} * kCacheLine;
    const std::ptrdiff_t panel_bytes = steps_ * kStepBytes;  // without the tail
    block.end = next_ + (panel_bytes < kAmxNextBytes ? panel_bytes : kAmxNextBytes);
  }

  void run_chunk(int index, int step, int steps, bool last) {
    const AmxBlock block = block_at(index, step, steps);
    if (step == 0 && !kAdd) {
      run<2, false>(block, last);
    } else {
      run<2, true>(block, last);
    }
  }
  void run_all(int index) {
    const AmxBlock block = block_at(index, 0, steps_);
    if (index * kBlockTokens + kTileRows < m_) {
      run<2, kAdd>(block, true);
    } else {
      run<1, kAdd>(block, true);
    }
  }
  template <int kTokenTiles, bool kOnTop>
  void run(const AmxBlock& block, bool last) {
    if (last) {
      multiply_block<kRows, kTokenTiles, kOnTop, true>(tiles_, block, tokens_, tail_);
    } else {
      multiply_block<kRows, kTokenTiles, kOnTop, false>(tiles_, block, tokens_, tail_);
    }
  }

  Tiles& tiles_;
  const bf16* x_;
  std::ptrdiff_t ldx_;
  const bf16* panel_;
  const char* next_;
  float* c_;
  int m_;
  int tokens_;  // of a tile
  int steps_;
  int blocks_;
  AmxTail<kRows> tail_;
};

/// panel_gemm_bf16 on `tiles`, which has
///   configure(const TileConfig&), release(), prefetch(const void*) to L2,
///   copy_padded(from, count, to, capacity): bf16 elements, zeros from count to capacity, a
///   multiple of 32, zero<tile>(), load<tile>(memory, row stride in bytes), store<tile>(memory, row
///   stride), multiply<c, a, b>(): TDPBF16PS.
template <bool kAdd = false, typename Tiles>
void amx_panel_gemm(Tiles& tiles, const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel,
                    int rows, int k_pad, const void* next, float* c) {
  if (m <= 0) return;
  if (kAdd && m > kTileRows && m % kTileRows != 0) {  // no token may be added to twice
    const int whole = m / kTileRows * kTileRows;
    amx_panel_gemm<kAdd>(tiles, x, ldx, whole, panel, rows, k_pad, panel, c);
    amx_panel_gemm<kAdd>(tiles, x + whole * ldx, ldx, m - whole, panel, rows, k_pad, next,
                         c + std::ptrdiff_t{whole} * kPanelRows);
    return;
  }
  switch (rows) {
    case 8: return AmxPanel<8, kAdd, Tiles>(tiles, x, ldx, m, panel, k_pad, next, c).multiply();
    case 16: return AmxPanel<16, kAdd, Tiles>(tiles, x, ldx, m, panel, k_pad, next, c).multiply();
    case 24: return AmxPanel<24, kAdd, Tiles>(tiles, x, ldx, m, panel, k_pad, next, c).multiply();
    default:
      return AmxPanel<kPanelRows, kAdd, Tiles>(tiles, x, ldx, m, panel, k_pad, next, c).multiply();
  }
}

}  // namespace
}  // namespace deinfer::cpu

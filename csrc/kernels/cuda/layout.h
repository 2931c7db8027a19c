// How matrices lie in device memory: in tiles of which every lane of a warp loads 16 bytes at once,
// exactly what it passes to mma.m16n8k16. Included by host and device code.
#pragma once

#include <cstdint>

namespace deinfer::cuda {

inline constexpr int kTileRows = 16;       // rows of weights in a tile
inline constexpr int kTileTokens = 8;      // tokens of activations in a tile
inline constexpr int kTileCols = 32;       // columns of either: two steps of an mma
inline constexpr int kTokenPadding = 128;  // activations have rows for a multiple of so many tokens

/// Parts of a sum over k. Every product sums within the parts first and then over them, in order,
/// whatever the number of tokens: so a token's result does not depend on the batch.
inline constexpr int kSlices = 8;
/// Positions of KV over which attention sums first, likewise.
inline constexpr int kSplitPositions = 128;

constexpr int tiles_of(int count, int size) { return (count + size - 1) / size; }

/// Elements before x[token, col] of activations with `chunks` tiles of columns.
constexpr std::int64_t activation_offset(int token, int col, int chunks) {
  const std::int64_t tile = std::int64_t{token / kTileTokens} * chunks + col / kTileCols;
  return tile * (kTileTokens * kTileCols) + token % kTileTokens * kTileCols + col % kTileCols;
}

/// Elements before W[row, col] of weights with `chunks` tiles of columns. A lane has 8 neighbouring
/// columns of two rows, as it has 8 of a token's: the order in which an mma takes k is free, as
/// long as both operands have the same.
constexpr std::int64_t weight_offset(int row, int col, int chunks) {
  const std::int64_t tile = std::int64_t{row / kTileRows} * chunks + col / kTileCols;
  const int lane = row % 8 * 4 + col % kTileCols / 8;
  const int step = col % 8 / 4;
  const int reg = row % kTileRows / 8 + 2 * (col % 4 / 2);
  return tile * (kTileRows * kTileCols) + step * 256 + lane * 8 + reg * 2 + col % 2;
}

/// Pairs of rows before the one that has W[row, col] of int8 weights: 16 bits for rows i and i + 8
/// of a tile, so that a lane's 8 columns are 16 bytes.
constexpr std::int64_t int8_offset(int row, int col, int chunks) {
  const std::int64_t tile = std::int64_t{row / kTileRows} * chunks + col / kTileCols;
  return tile * (8 * kTileCols) + row % 8 * kTileCols + col % kTileCols;
}

/// What q, magnitude and sign (bit 7), is within that pair: of row i its magnitude are bits 0-6 and
/// its sign is bit 15, of row i + 8 bits 8-14 and 7: with its bytes exchanged it lies as the other.
constexpr std::uint16_t int8_bits(int row, std::uint8_t q) {
  const unsigned magnitude = q & 0x7fu;
  const unsigned sign = q >> 7;
  const bool first = row % kTileRows < 8;
  return static_cast<std::uint16_t>(first ? sign << 15 | magnitude : magnitude << 8 | sign << 7);
}

/// Products see q / kInt8Unit, and rows' scales on the device are multiplied with it.
inline constexpr float kInt8Unit = 64.0f;

/// Rows of weights in the order in which products rotate them: rows i and i + 8 of a tile turn
/// together, elements j and j + head_dim / 2 of a head.
constexpr int rotary_tiles(int head_dim) { return tiles_of(head_dim / 2, 8); }

/// Elements from one head to the next in q and in the KV cache: what attention is compiled for, or
/// 0 where head_dim is too large.
constexpr int head_width(int head_dim) {
  if (head_dim <= 64) return 64;
  if (head_dim <= 96) return 96;
  if (head_dim <= 128) return 128;
  return head_dim <= 256 ? 256 : 0;
}

}  // namespace deinfer::cuda

// How attention divides the rows of a sequence into tiles, and what a tile sees into splits.
// Included by host and device code.
#pragma once

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

inline constexpr int kQueryRows = 16;  // of a tile: tokens and the heads of a group

/// Tiles of a sequence with so many rows.
constexpr int query_tiles(int num_rows, int group) {
  return tiles_of(num_rows * group, kQueryRows);
}

/// The splits that the rows of a tile see.
struct TileSplits {
  int first = 0;
  int count = 0;
  int rows = 0;
};

constexpr TileSplits splits_of(int num_rows, int first_position, int tile, int group, int window) {
  const int first_row = tile * kQueryRows;
  const int rows =
      num_rows * group - first_row < kQueryRows ? num_rows * group - first_row : kQueryRows;
  const int last_position = first_position + (first_row + rows - 1) / group;
  const int begin = window > 0 ? first_position + first_row / group - window + 1 : 0;
  const int first = begin > 0 ? begin / kSplitPositions : 0;
  return {first, last_position / kSplitPositions + 1 - first, rows};
}

}  // namespace deinfer::cuda

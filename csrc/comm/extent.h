// What of a contribution to an exchange between devices another rank reads: for transports that
// move contributions instead of letting kernels read them where they are.
#pragma once

#include <cstddef>

#include "kernels/cuda/exchange.h"
#include "kernels/cuda/layout.h"

namespace deinfer {

/// Rows of equal length in memory, `pitch` bytes apart.
struct ByteBlock {
  std::size_t offset = 0;  // of the first row
  std::size_t row_bytes = 0;
  std::size_t pitch = 0;
  std::size_t rows = 0;

  std::size_t bytes() const { return rows * row_bytes; }
};

/// A matrix that every rank contributes, in tiles that lie row by row, and the shares of it that
/// ranks own: by rows, by columns, by both, or neither, where everything is everybody's.
struct Extent {
  static constexpr int kMaxColumns = cuda::LinearLaunch::kMaxSegments;

  int rows = 0;
  int cols = 0;  // of one row to the next
  int tile_rows = 1;
  int tile_cols = 1;
  std::size_t tile_bytes = 4;
  /// What of a part is read: what its writer owns (to gather), or what its reader does (to scatter
  /// sums).
  bool of_reader = false;
  bool by_rows = false;
  cuda::Borders row_owners;
  struct Columns {
    int first = 0;
    cuda::Borders owners;  // of columns, from `first` on
  };
  Columns columns[kMaxColumns];
  int num_columns = 0;  // 0: whole rows

  /// fp32, rows `ld` numbers apart.
  static Extent floats(int rows, int ld);
  /// bf16 in the tiles of products.
  static Extent activations(int rows, int chunks);
  Extent& divide_rows(const cuda::Borders& owners);
  Extent& divide_columns(const cuda::Borders& owners, int first = 0);

  /// What rank `reader` reads of what rank `writer` contributes. Returns how many blocks, none of
  /// them empty. Tiles are whole, and rows that follow one another are one.
  int blocks(int writer, int reader, ByteBlock (&out)[kMaxColumns]) const;
};

}  // namespace deinfer

#include "comm/extent.h"

namespace deinfer {
namespace {

/// Of tiles.
struct TileRange {
  int begin = 0;
  int end = 0;
  std::size_t size() const { return static_cast<std::size_t>(end - begin); }
};

/// The tiles that [begin, end) touches.
TileRange tiles_touched(int begin, int end, int size) {
  if (begin >= end) return {};
  return {begin / size, cuda::tiles_of(end, size)};
}

}  // namespace

Extent Extent::floats(int rows, int ld) {
  Extent extent;
  extent.rows = rows;
  extent.cols = ld;
  return extent;
}

Extent Extent::activations(int rows, int chunks) {
  Extent extent;
  extent.rows = rows;
  extent.cols = chunks * cuda::kTileCols;
  extent.tile_rows = cuda::kTileTokens;
  extent.tile_cols = cuda::kTileCols;
  extent.tile_bytes = std::size_t{2} * cuda::kTileTokens * cuda::kTileCols;
  return extent;
}

Extent& Extent::divide_rows(const cuda::Borders& owners) {
  by_rows = true;
  row_owners = owners;
  return *this;
}

Extent& Extent::divide_columns(const cuda::Borders& owners, int first) {
  columns[num_columns++] = {first, owners};
  return *this;
}

int Extent::blocks(int writer, int reader, ByteBlock (&out)[kMaxColumns]) const {
  const int owner = of_reader ? reader : writer;
  const TileRange down =
      by_rows ? tiles_touched(row_owners.at[owner], row_owners.at[owner + 1], tile_rows)
              : tiles_touched(0, rows, tile_rows);
  const auto across_all = static_cast<std::size_t>(cuda::tiles_of(cols, tile_cols));
  int count = 0;
  auto add = [&](TileRange across) {
    if (down.size() == 0 || across.size() == 0) return;
    ByteBlock& block = out[count++];
    block.pitch = across_all * tile_bytes;
    block.offset = static_cast<std::size_t>(down.begin) * block.pitch +
                   static_cast<std::size_t>(across.begin) * tile_bytes;
    block.row_bytes = across.size() * tile_bytes;
    block.rows = down.size();
    if (block.row_bytes != block.pitch) return;
    block.row_bytes *= block.rows;
    block.pitch = block.row_bytes;
    block.rows = 1;
  };
  if (num_columns == 0) add(tiles_touched(0, cols, tile_cols));
  for (int i = 0; i < num_columns; ++i) {
    const Columns& part = columns[i];
    add(tiles_touched(part.first + part.owners.at[owner], part.first + part.owners.at[owner + 1],
                      tile_cols));
  }
  return count;
}

}  // namespace deinfer

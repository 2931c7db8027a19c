#include "kernels/cuda/packing.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/packing.h"

namespace deinfer::cuda {

void pack_weights(const TensorView& source, std::span<const std::int32_t> row_map, int first_tile,
                  int last_tile, bf16* out, int first_col) {
  const int cols = static_cast<int>(source.cols);
  const int chunks = tiles_of(first_col + cols, kTileCols);
  const auto rows =
      static_cast<int>(row_map.empty() ? static_cast<std::size_t>(source.rows) : row_map.size());
  std::fill_n(out, std::int64_t{last_tile - first_tile} * chunks * kTileRows * kTileCols, bf16{});
  std::vector<float> values(static_cast<std::size_t>(cols));
  for (int row = first_tile * kTileRows; row < std::min(last_tile * kTileRows, rows); ++row) {
    const std::int64_t from = row_map.empty() ? row : row_map[static_cast<std::size_t>(row)];
    if (from < 0) continue;
    cpu::read_row(source, from, values.data());
    for (int col = 0; col < cols; ++col) {
      out[weight_offset(row - first_tile * kTileRows, first_col + col, chunks)] =
          to_bf16(values[static_cast<std::size_t>(col)]);
    }
  }
}

}  // namespace deinfer::cuda

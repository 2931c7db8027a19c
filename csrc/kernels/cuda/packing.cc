#include "kernels/cuda/packing.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/packing.h"

namespace deinfer::cuda {
namespace {

/// f(row of the tiles, source row, its values as fp32) for the rows that tiles have.
template <typename F>
void for_rows(const TensorView& source, std::span<const std::int32_t> row_map, int first_tile,
              int last_tile, F f) {
  const auto rows =
      static_cast<int>(row_map.empty() ? static_cast<std::size_t>(source.rows) : row_map.size());
  std::vector<float> values(static_cast<std::size_t>(source.cols));
  for (int row = first_tile * kTileRows; row < std::min(last_tile * kTileRows, rows); ++row) {
    const std::int64_t from = row_map.empty() ? row : row_map[static_cast<std::size_t>(row)];
    if (from < 0) continue;
    cpu::read_row(source, from, values.data());
    f(row - first_tile * kTileRows, from, values);
  }
}

}  // namespace

void pack_weights(const TensorView& source, std::span<const std::int32_t> row_map, int first_tile,
                  int last_tile, bf16* out, int first_col) {
  const int chunks = tiles_of(first_col + static_cast<int>(source.cols), kTileCols);
  std::fill_n(out, std::int64_t{last_tile - first_tile} * chunks * kTileRows * kTileCols, bf16{});
  for_rows(source, row_map, first_tile, last_tile,
           [&](int row, std::int64_t, const std::vector<float>& values) {
             int col = first_col;
             for (float value : values) out[weight_offset(row, col++, chunks)] = to_bf16(value);
           });
}

void pack_int8_weights(const TensorView& source, std::span<const std::int32_t> row_map,
                       int first_tile, int last_tile, std::uint16_t* out, float* scales,
                       int first_col) {
  const int chunks = tiles_of(first_col + static_cast<int>(source.cols), kTileCols);
  const std::int64_t tiles = last_tile - first_tile;
  std::fill_n(out, tiles * chunks * kTileRows * kTileCols / 2, std::uint16_t{0});
  std::fill_n(scales, tiles * kTileRows, 0.0f);
  for_rows(source, row_map, first_tile, last_tile,
           [&](int row, std::int64_t from, const std::vector<float>& values) {
             const float scale = cpu::int8_scale(source, from);
             scales[row] = scale * kInt8Unit;
             int col = first_col;
             for (float value : values) {
               std::uint16_t& pair = out[int8_offset(row, col++, chunks)];
               pair = static_cast<std::uint16_t>(pair | int8_bits(row, cpu::to_int8(value, scale)));
             }
           });
}

}  // namespace deinfer::cuda

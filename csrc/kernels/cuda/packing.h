// Weights on their way to the device, in the order of layout.h.
#pragma once

#include <cstdint>
#include <span>

#include "base/bf16.h"
#include "deinfer/tensor.h"
#include "kernels/cuda/layout.h"

namespace deinfer::cuda {

/// Writes the tiles of rows [first_tile, last_tile) of `source` (fp32, bf16 or fp16, any row
/// stride) to out, which is where tile first_tile begins. Row i of the result is source row
/// row_map[i], or zero where that is negative or there is none; an empty row_map is the identity.
/// The source's columns become those from first_col on; others up to a multiple of kTileCols are
/// zero. Rounds to nearest even.
void pack_weights(const TensorView& source, std::span<const std::int32_t> row_map, int first_tile,
                  int last_tile, bf16* out, int first_col = 0);

/// The same in int8: pairs of rows in the order of int8_offset(), q as cpu::to_int8() rounds them,
/// and scales[16 (last_tile - first_tile)], cpu::int8_scale() times kInt8Unit, 0 of rows that are
/// zero. Throws as cpu::int8_scale() does.
void pack_int8_weights(const TensorView& source, std::span<const std::int32_t> row_map,
                       int first_tile, int last_tile, std::uint16_t* out, float* scales,
                       int first_col = 0);

}  // namespace deinfer::cuda

// Embeddings of tokens and of learned positions.
#pragma once

#include <span>

#include "deinfer/sampling_params.h"
#include "kernels/cpu/packing.h"
#include "ops/context.h"

namespace deinfer {

/// out[i] = table[tokens[i]] as fp32, row stride ldo. The table is packed, so that tied embeddings
/// and output projection share one copy.
void embedding(ExecutionContext& ctx, std::span<const TokenId> tokens,
               const cpu::PackedMatrix& table, float* out, std::ptrdiff_t ldo);

/// out[i] += table[positions[i] + offset], row stride ldo; memory holds [m, table.k] floats.
void add_positions(ExecutionContext& ctx, std::span<const int> positions, int offset,
                   const cpu::PackedMatrix& table, float* memory, float* out, std::ptrdiff_t ldo);

}  // namespace deinfer

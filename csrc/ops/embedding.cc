#include "ops/embedding.h"

namespace deinfer {

void embedding(ExecutionContext& ctx, std::span<const TokenId> tokens,
               const cpu::PackedMatrix& table, float* out, std::ptrdiff_t ldo) {
  auto [begin, end] = ctx.member.share(static_cast<int>(tokens.size()));
  for (int i = begin; i < end; ++i) {
    table.read_row(tokens[static_cast<std::size_t>(i)], out + i * ldo);
  }
  ctx.member.barrier();
}

void add_positions(ExecutionContext& ctx, std::span<const int> positions, int offset,
                   const cpu::PackedMatrix& table, float* memory, float* out, std::ptrdiff_t ldo) {
  auto [begin, end] = ctx.member.share(static_cast<int>(positions.size()));
  for (int i = begin; i < end; ++i) {
    float* row = memory + std::ptrdiff_t{i} * table.k;
    table.read_row(positions[static_cast<std::size_t>(i)] + offset, row);
    ctx.kernels.add_row(row, table.k, out + i * ldo);
  }
  ctx.member.barrier();
}

}  // namespace deinfer

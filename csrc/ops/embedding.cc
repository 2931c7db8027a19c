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

}  // namespace deinfer

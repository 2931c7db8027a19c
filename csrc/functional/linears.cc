// The linears of OpExecutor: packing, and products of packed linears with activations.
#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "functional/executor_impl.h"
#include "functional/packed_format.h"
#include "ops/lowrank_linear.h"

namespace deinfer {
namespace {

/// One matrix by all members; `packed` lies in borrowed memory that this is to fill.
void pack_matrix(const TeamMember& member, const TensorView& source, cpu::PackedMatrix& packed) {
  auto [first, last] = member.share(packed.num_panels());
  cpu::pack_rows(source, {}, first, last, packed);
  if (member.id() != 0) return;
  // What lies before the next matrix: equal weights have equal bytes.
  const std::size_t bytes = packed.data.size();
  std::memset(packed.data.as<std::byte>() + bytes, 0, packed_aligned(bytes) - bytes);
}

void check_input(const TensorView& x, const PackedLinears& linears, int count) {
  check_argument(linears.count() == count, "this operation takes ", count, " packed linears, not ",
                 linears.count());
  check_matrix("x", x);
  check_argument(x.dtype == linears.dtype(), "x is ", dtype_name(x.dtype),
                 " and the packed weights ", dtype_name(linears.dtype()));
  check_argument(x.cols == linears.in_features(), "x has ", x.cols, " columns, the linears take ",
                 linears.in_features());
}

void check_output(const MutableTensorView& out, const char* name, const TensorView& x,
                  std::int64_t cols) {
  check_matrix(name, out);
  check_argument(out.dtype == x.dtype, name, " is ", dtype_name(out.dtype), " and x ",
                 dtype_name(x.dtype));
  check_argument(out.rows == x.rows && out.cols == cols, name, " has shape [", out.rows, ", ",
                 out.cols, "], not [", x.rows, ", ", cols, "]");
}

}  // namespace

template <typename F>
void OpExecutor::Impl::for_tiles(const TensorView& x, const PackedLinears& packed,
                                 const LinearGroup& group, int threads, F f) {
  check_threads(threads);
  const int m = static_cast<int>(x.rows);
  if (m == 0) return;
  const int k = static_cast<int>(x.cols);
  const int tile = std::min(m, kTileTokens);
  int z_cols = 1;
  for (const LowRankLinear& linear : group) z_cols += linear.z_cols();
  const Activations z = z_memory.take(x.dtype, tile, z_cols);
  // Packed weights of an odd k read one column more.
  const bool padded = k % 2 != 0;
  const Activations copy = padded ? x_copy.take(x.dtype, tile, k) : Activations{};
  // A row costs the bandwidth of the weights or, from some rows on, arithmetic.
  threads = worthwhile_threads(packed.parameters() * std::max(1, m / 4), threads);
  run(threads, [&](ExecutionContext& ctx) {
    for (int row = 0; row < m; row += tile) {
      const int rows = std::min(tile, m - row);
      Activations input = activations_of(x).rows_from(row);
      if (padded) {
        const std::size_t bytes = static_cast<std::size_t>(k) * dtype_size(x.dtype);
        auto [first, last] = ctx.member.share(rows);
        for (int i = first; i < last; ++i) {
          auto* to = static_cast<std::byte*>(copy.rows_from(i).data);
          std::memcpy(to, input.rows_from(i).data, bytes);
          std::memset(to + bytes, 0, dtype_size(x.dtype));
        }
        ctx.member.barrier();
        input = copy;
      }
      f(ctx, rows, GroupInput(input), z, row);
    }
  });
}

void OpExecutor::pack(std::span<const LinearWeights> linears, DType dtype, void* memory,
                      std::size_t bytes, int threads) {
  check_threads(threads);
  const PackedHeader header = make_header(linears, dtype, threads);
  check_argument(bytes == header.bytes, "packed linears need ", header.bytes, " bytes, not ",
                 bytes);
  check_aligned(memory);
  advise_huge_pages(memory, bytes);
  std::memset(memory, 0, kPackedHeaderBytes);
  std::memcpy(memory, &header, sizeof(header));
  const PackedLinears packed(memory, bytes);
  LinearGroup group;
  lay_out(header, memory, group);
  std::lock_guard lock(impl_->turn);
  impl_->run(worthwhile_threads(packed.parameters(), threads), [&](ExecutionContext& ctx) {
    for (std::size_t i = 0; i < linears.size(); ++i) {
      LowRankLinear& linear = group[i];
      if (linear.is_low_rank()) {
        pack_matrix(ctx.member, linears[i].v, linear.v);
        pack_matrix(ctx.member, linears[i].u, linear.u);
      } else {
        pack_matrix(ctx.member, linears[i].u, linear.w);
      }
      if (ctx.member.id() != 0 || !linear.has_bias()) continue;
      std::memset(linear.bias.as<void>(), 0, linear.bias.size());
      cpu::read_row(linears[i].bias, 0, linear.bias.as<float>());
    }
  });
}

void OpExecutor::lowrank_linear(const TensorView& x, const PackedLinears& linear,
                                const MutableTensorView& out, int threads) {
  check_input(x, linear, 1);
  check_output(out, "out", x, linear.out_features(0));
  LinearGroup group;
  lay_out(header_of(linear), linear.memory(), group);
  std::lock_guard lock(impl_->turn);
  impl_->for_tiles(
      x, linear, group, threads,
      [&](ExecutionContext& ctx, int rows, const GroupInput& input, const Activations& z, int row) {
        const Activations to = activations_of(out).rows_from(row);
        lowrank_linears(ctx, rows, input, std::span(group.data(), 1), z, std::span(&to, 1));
      });
}

void OpExecutor::lowrank_gated_mlp(const TensorView& x, const PackedLinears& gate_up,
                                   const MutableTensorView& out, int threads) {
  check_input(x, gate_up, 2);
  check_argument(gate_up.out_features(0) == gate_up.out_features(1), "gate has ",
                 gate_up.out_features(0), " outputs and up ", gate_up.out_features(1));
  check_output(out, "out", x, gate_up.out_features(0));
  LinearGroup group;
  lay_out(header_of(gate_up), gate_up.memory(), group);
  std::lock_guard lock(impl_->turn);
  impl_->for_tiles(
      x, gate_up, group, threads,
      [&](ExecutionContext& ctx, int rows, const GroupInput& input, const Activations& z, int row) {
        deinfer::lowrank_gated_mlp(ctx, rows, input, group[0], group[1], GateKind::kSilu, z,
                                   activations_of(out).rows_from(row));
      });
}

void OpExecutor::lowrank_qkv(const TensorView& x, const PackedLinears& linears,
                             std::span<const MutableTensorView> outs, int threads) {
  constexpr int kCount = 3;
  check_input(x, linears, kCount);
  check_argument(outs.size() == kCount, "outs must be q, k and v, not ", outs.size(), " matrices");
  for (int i = 0; i < kCount; ++i) {
    static constexpr const char* kNames[kCount] = {"q", "k", "v"};
    check_output(outs[static_cast<std::size_t>(i)], kNames[i], x, linears.out_features(i));
  }
  LinearGroup group;
  lay_out(header_of(linears), linears.memory(), group);
  std::lock_guard lock(impl_->turn);
  impl_->for_tiles(
      x, linears, group, threads,
      [&](ExecutionContext& ctx, int rows, const GroupInput& input, const Activations& z, int row) {
        std::array<Activations, kCount> to;
        for (std::size_t i = 0; i < to.size(); ++i) {
          to[i] = activations_of(outs[i]).rows_from(row);
        }
        lowrank_linears(ctx, rows, input, group, z, to);
      });
}

}  // namespace deinfer

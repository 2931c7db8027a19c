// What an operation needs to run on one thread of a rank's team.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/buffer.h"
#include "base/thread_team.h"
#include "deinfer/tensor.h"
#include "kernels/cpu/kernel_table.h"
#include "ops/linear.h"
#include "ops/team_exchange.h"
#include "plan/overlap.h"

namespace deinfer {

/// Rows of activations[m, cols], ld elements apart; fp32 or bf16. Columns beyond `cols` up to the
/// next multiple of 16 are zero, because packed weights read that far.
struct Activations {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::ptrdiff_t ld = 0;

  Activations rows_from(int row) const { return columns_from(row * ld); }
  Activations columns_from(std::ptrdiff_t col) const {
    auto* bytes =
        static_cast<std::byte*>(data) + static_cast<std::ptrdiff_t>(dtype_size(dtype)) * col;
    return {bytes, dtype, ld};
  }
  float* f32() const { return static_cast<float*>(data); }
  bf16* b16() const { return static_cast<bf16*>(data); }
};

/// Elements from one row of `cols` to the next: 64 bytes beyond the row keep rows out of one
/// another's cache sets.
constexpr std::ptrdiff_t activation_stride(DType dtype, int cols) {
  return (cols + 15) / 16 * 16 + 64 / static_cast<int>(dtype_size(dtype));
}

/// Memory of Activations, allocated once and reused by every step.
class ActivationBuffer {
 public:
  ActivationBuffer() = default;
  ActivationBuffer(DType dtype, int rows, int cols)
      : dtype_(dtype),
        ld_(activation_stride(dtype, cols)),
        buffer_(static_cast<std::size_t>(rows) * static_cast<std::size_t>(ld_) *
                dtype_size(dtype)) {}
  Activations view() { return {buffer_.as<void>(), dtype_, ld_}; }

 private:
  DType dtype_ = DType::kFloat32;
  std::ptrdiff_t ld_ = 0;
  Buffer buffer_;
};

/// Rows of bf16 activations as KernelTable::expand_inputs writes them, kept while one product after
/// the other reads them.
struct ExpandedInputs {
  static constexpr std::ptrdiff_t kMostFloats = std::ptrdiff_t{8} << 20;  // more are not expanded
  const void* data = nullptr;                                             // of what; null: nothing
  int rows = 0;
  int cols = 0;
  Buffer floats{static_cast<std::size_t>(kMostFloats) * sizeof(float)};  // touched where used

  void forget() { data = nullptr; }
};

/// One thread's private memory.
struct ThreadScratch {
  ThreadScratch()
      : tile_a(kTileTokens * cpu::kPanelRows * sizeof(float)),
        tile_b(kTileTokens * cpu::kPanelRows * sizeof(float)) {}
  Buffer tile_a;
  Buffer tile_b;
  ExpandedInputs expanded, second_expanded;  // of a PanelJob's two matrices
  Buffer attention;
  ActivationBuffer normed;        // [normed_rows, hidden]
  int normed_rows = 0;            // up to so many rows are normalised by every thread for itself
  std::vector<float> statistics;  // [normed_rows, 2]
  std::vector<float> row;         // [hidden]
};

/// Operations are collective: every thread of the team calls them with its own context, and they
/// return when the results of all threads are visible. They neither allocate nor throw on input;
/// what they are given was checked when the batch was built.
struct ExecutionContext {
  const cpu::KernelTable& kernels;
  TeamMember& member;
  ThreadScratch& scratch;
  TeamExchange& exchange;
  Ticket ticket = 0;  // of this rank's next exchange; from TeamExchange::next_ticket()
  StepKind step_kind = StepKind::kDecode;
  ResidualLayout residual = ResidualLayout::kReplicated;  // in this kind of step
  Overlap overlap{};                                      // of this step
  float* partial_sums = nullptr;  // shared by the team: of U over the chunks of z that have come;
                                  // partial_sums_bytes() of any group of linears

  /// This rank's contribution to its next exchange, of fp32 numbers.
  float* floats_to_send() const { return reinterpret_cast<float*>(exchange.send(member, ticket)); }
  const float* floats_from(int rank, Ticket of) const {
    return reinterpret_cast<const float*>(exchange.from(rank, of));
  }
  /// Starts it when all threads have written theirs, and waits for the other ranks.
  Ticket exchange_floats(Collective kind, int rows, int cols) {
    exchange.start(member, kind,
                   static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(float));
    exchange.wait(member, ticket);
    return ticket++;
  }
};

/// f(first row, rows) for the chunks in which m tokens pass through the layers.
template <typename F>
void for_each_tile(const ExecutionContext& ctx, int m, F f) {
  const int most = ctx.overlap.tile_tokens;
  for (int row = 0; row < m; row += most) f(row, std::min(most, m - row));
}

}  // namespace deinfer

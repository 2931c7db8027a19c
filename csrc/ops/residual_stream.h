// The residual stream x[m, hidden] of a rank, under any layout: entry, norms and exit.
#pragma once

#include <span>
#include <vector>

#include "deinfer/sampling_params.h"
#include "kernels/cpu/packing.h"
#include "ops/context.h"
#include "ops/linear_group.h"
#include "ops/norm.h"

namespace deinfer {

struct ResidualLimits {
  int max_tokens = 0;
  int max_wanted = 0;     // rows of one call of wanted()
  bool branches = false;  // whether branch() is needed
  bool sharded = false;   // whether some kind of step has hidden or token shards
};

/// Owned by a rank's decoder. All operations are collective over the rank's team and, but under a
/// replicated stream, over the ranks.
class ResidualStream {
 public:
  /// `hidden_shares` are the columns of every rank under hidden shards, else empty.
  ResidualStream(int hidden, std::vector<Range> hidden_shares, DType activations,
                 const ResidualLimits& limits);

  /// fp32 rows ld() apart: of this rank's columns under hidden shards; under token shards only its
  /// own rows mean something.
  float* rows() { return rows_.as<float>(); }
  std::ptrdiff_t ld() const { return columns_; }

  /// x[i] = scale * the row tokens[i] of the embedding, of which this rank's `table` has the rows
  /// `vocabulary`.
  void embed(ExecutionContext& ctx, std::span<const TokenId> tokens, const cpu::PackedMatrix& table,
             Range vocabulary, float scale);

  /// x[i] += the row positions[i] + offset of `table`, which has this rank's columns under hidden
  /// shards, else all.
  void add_positions(ExecutionContext& ctx, std::span<const int> positions, int offset,
                     const cpu::PackedMatrix& table);

  /// norm(x) as the linears of a group read it; `gather` also fills GroupInput::gathered under
  /// sharded layouts. Valid until the next call on this thread.
  GroupInput normed(ExecutionContext& ctx, int m, const Norm& norm, bool gather);

  /// Memory laid out as rows(), for what a block adds.
  float* branch() { return branch_.as<float>(); }
  /// x += norm(branch), which is overwritten. Hidden shards exchange a number per token for the
  /// norm, which must be kRms there, as in all models. (Were U orthonormal, which a change of basis
  /// of the rank dimension could make it offline, |U z| = |z| would need no exchange.)
  void add_branch(ExecutionContext& ctx, int m, const Norm& norm);

  /// out[count, hidden] = whole rows of x, rows[0 .. count), on rank 0, each by the thread that has
  /// it in member.share(count): unlike other operations this one may leave before the others have
  /// written theirs. `out` is not used on other ranks. Call it where x is complete and a barrier
  /// precedes its next change.
  void gather_rows(ExecutionContext& ctx, int count, const int* rows, int m, float* out);

  /// norm() of whole rows of x, rows[0 .. count): [count, hidden] on every rank.
  Activations wanted(ExecutionContext& ctx, int count, const int* rows, int m, const Norm& norm);

 private:
  GroupInput normed_shard(ExecutionContext& ctx, int m, const Norm& norm);
  void gather_columns(ExecutionContext& ctx, int m, const Norm& norm);
  void gather_tokens(ExecutionContext& ctx, int m);
  void scale_branch(ExecutionContext& ctx, int row, int count, const Norm& norm);
  Range own_columns(const ExecutionContext& ctx) const;
  void exchange_rows(ExecutionContext& ctx, Collective kind, int count, const int* rows, int m,
                     float* out);

  int hidden_;
  std::vector<Range> hidden_shares_;
  int columns_;  // of rows_
  Buffer rows_;
  Buffer branch_;
  ActivationBuffer normed_;    // [max_tokens, hidden]
  ActivationBuffer gathered_;  // likewise, under sharded layouts
  Buffer statistics_;          // [max_tokens, 2]
  Buffer wanted_;              // [max_wanted, hidden] fp32
};

}  // namespace deinfer

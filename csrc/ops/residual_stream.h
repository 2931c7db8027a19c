// The residual stream x[m, hidden] of a rank, under any layout: entry, norms and exit.
#pragma once

#include <span>
#include <vector>

#include "deinfer/sampling_params.h"
#include "kernels/cpu/packing.h"
#include "ops/context.h"
#include "ops/linear_group.h"

namespace deinfer {

/// Owned by a rank's decoder. All operations are collective over the rank's team and, but under a
/// replicated stream, over the ranks.
class ResidualStream {
 public:
  /// `hidden_shares` are the columns of every rank under hidden shards, else empty. At most
  /// max_tokens rows, and max_wanted rows of one call of wanted().
  ResidualStream(int hidden, std::vector<Range> hidden_shares, DType activations, int max_tokens,
                 int max_wanted);

  /// fp32 rows ld() apart: of this rank's columns under hidden shards; under token shards only its
  /// own rows mean something.
  float* rows() { return rows_.as<float>(); }
  std::ptrdiff_t ld() const { return columns_; }

  /// x[i] = the row tokens[i] of the embedding, of which this rank's `table` has the rows
  /// `vocabulary`.
  void embed(ExecutionContext& ctx, std::span<const TokenId> tokens, const cpu::PackedMatrix& table,
             Range vocabulary);

  /// RMSNorm of x with gain[hidden], as the linears of a group read it; `gather` also fills
  /// GroupInput::gathered under sharded layouts. Valid until the next call on this thread.
  GroupInput normed(ExecutionContext& ctx, int m, const std::vector<float>& gain, float eps,
                    bool gather);

  /// RMSNorm of whole rows of x, rows[0 .. count): [count, hidden] on every rank.
  Activations wanted(ExecutionContext& ctx, int count, const int* rows, int m,
                     const std::vector<float>& gain, float eps);

 private:
  GroupInput normed_shard(ExecutionContext& ctx, int m, const float* gain);
  void gather_columns(ExecutionContext& ctx, int m, const float* gain, float eps);
  void gather_tokens(ExecutionContext& ctx, int m);
  Range own_columns(const ExecutionContext& ctx) const;

  int hidden_;
  std::vector<Range> hidden_shares_;
  int columns_;  // of rows_
  Buffer rows_;
  ActivationBuffer normed_;    // [max_tokens, hidden]
  ActivationBuffer gathered_;  // likewise, under sharded layouts
  Buffer sum_squares_;         // [max_tokens]
  Buffer wanted_;              // [max_wanted, hidden] fp32
};

}  // namespace deinfer

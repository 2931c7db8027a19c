// Linears that are computed together because they share their input, over the ranks of a plan.
#pragma once

#include <span>

#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/panel_jobs.h"

namespace deinfer {

/// Takes the latent z[r] of row `row` of the batch, which has the zeros of a z buffer behind it.
class LatentStore {
 public:
  virtual ~LatentStore() = default;
  virtual void store(const Activations& z, int row) const = 0;
};

/// Where the columns of a linear's output, or of the outputs of two that an epilogue combines (gate
/// and up), go; and z of the first, if it is wanted itself. No epilogue: only z is wanted.
struct Branch {
  const LowRankLinear* linear = nullptr;
  const Epilogue* epilogue = nullptr;
  const LowRankLinear* second = nullptr;
  const LatentStore* latent = nullptr;
};

/// What a group reads. `x` is what this rank has of the input: columns of the hidden shard, or rows
/// of the token shard at their places in the batch.
struct GroupInput {
  GroupInput() = default;
  explicit GroupInput(const Activations& input) : x(input) {}

  Activations x;
  Activations gathered;  // all columns and rows, for dense linears whose plan gathers before them
  /// Hidden shards, where `norm` is completed after V: x has gains applied and is, for kLayer,
  /// centred on the mean of this rank's columns, whose statistics [m, statistics_columns(kind)]
  /// travel with z. Null otherwise. Every thread may have its own copy.
  const Norm* norm = nullptr;
  const float* statistics = nullptr;
  std::span<const Range> shares;  // the columns of every rank
};

/// Bytes of ExecutionContext::partial_sums that a group of linears needs: 0 where its z never
/// travels in chunks.
std::size_t partial_sums_bytes(std::span<const LowRankLinear* const> group);

/// Runs the branches for m tokens: all V factors in one pass over x, the exchange of z that the
/// plan asks for, all U factors with their epilogues; overlapped as ctx.overlap says. z is a
/// buffer of m rows and enough columns for the z of all linears. A linear whose output is exchanged
/// (`after_u`) must be alone in its group, but for a pair that one epilogue combines. Collective;
/// results are visible to all threads of the rank.
void run_group(ExecutionContext& ctx, int m, const GroupInput& input, const Activations& z,
               std::span<const Branch> branches);

}  // namespace deinfer

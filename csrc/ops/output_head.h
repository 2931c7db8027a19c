// From final hidden states to logits or tokens, over vocabulary shards.
#pragma once

#include <span>
#include <vector>

#include "deinfer/sampling_params.h"
#include "ops/lowrank_linear.h"

namespace deinfer {

/// out[m, vocabulary] (fp32, contiguous) = head(x[m, hidden]) on rank 0, gathered from the ranks,
/// of which each has the rows vocabularies[rank] of the head; null on the others. soft_cap as in
/// lowrank_linear.
void output_logits(ExecutionContext& ctx, int m, const GroupInput& x, const LowRankLinear& head,
                   float soft_cap, const Activations& z, std::span<const Range> vocabularies,
                   float* out);

/// tokens[m] = the place of the largest logit, the lowest of equal ones, on rank 0. maxima[threads]
/// and value[m] are working memory of at least m rows.
void output_most_likely(ExecutionContext& ctx, int m, const GroupInput& x,
                        const LowRankLinear& head, float soft_cap, const Activations& z,
                        std::span<const Range> vocabularies, std::span<RowMaximum> maxima,
                        float* value, TokenId* tokens);

}  // namespace deinfer

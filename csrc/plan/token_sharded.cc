// For many tokens: every rank has some rows of the residual stream, norms and multiplies them by
// the whole factors of the hidden side; z is gathered before U and scattered after V. This is
// sequence parallelism (arXiv 2205.05198) at rank size. Shares its weight layout with
// two_collective.
#include "plan/plans.h"

namespace deinfer {
namespace {

class TokenShardedPlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "token_sharded"; }
  ResidualLayout residual() const override { return ResidualLayout::kTokenShards; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    if (role == LinearRole::kHead) return place_head(*this, shape, rank);
    LinearPlacement part = place_whole(shape);
    const bool low_rank = shape.rank > 0;
    if (adds_to_residual(role)) {
      (low_rank ? part.v_cols : part.u_cols) = input_share(*this, role, rank);
      (low_rank ? part.after_v : part.after_u) = Exchange::kReduceScatter;
    } else {
      part.u_rows = output_share(*this, role, rank);
      (low_rank ? part.after_v : part.before) = Exchange::kAllGather;
    }
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_token_sharded_plan(const ModelShape& model, int size) {
  return std::make_unique<TokenShardedPlan>(model, size);
}

}  // namespace deinfer

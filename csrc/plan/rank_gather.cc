// DeInfer's division (arXiv 2604.17709): only z travels. The U factors of attention output and down
// are on every rank.
#include "plan/plans.h"

namespace deinfer {
namespace {

class RankGatherPlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "rank_gather"; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    if (role == LinearRole::kHead) return place_head(*this, shape, rank);
    LinearPlacement part = place_whole(shape);
    const bool low_rank = shape.rank > 0;
    if (adds_to_residual(role)) {
      (low_rank ? part.v_cols : part.u_cols) = input_share(*this, role, rank);
      (low_rank ? part.after_v : part.after_u) = Exchange::kAllReduce;
      return part;
    }
    part.u_rows = output_share(*this, role, rank);
    if (low_rank) {
      part.v_rows = split(shape.rank, size(), rank);
      part.after_v = Exchange::kAllGather;
    }
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_rank_gather_plan(const ModelShape& model, int size) {
  return std::make_unique<RankGatherPlan>(model, size);
}

}  // namespace deinfer

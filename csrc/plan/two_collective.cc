// The factors on the side of the hidden dimension are on every rank: more weights to read, but only
// two exchanges per layer. Shares its weight layout with token_sharded.
#include "plan/plans.h"

namespace deinfer {
namespace {

class TwoCollectivePlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "two_collective"; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    if (role == LinearRole::kHead) return place_head(*this, shape, rank);
    LinearPlacement part = place_whole(shape);
    if (adds_to_residual(role)) {
      const bool low_rank = shape.rank > 0;
      (low_rank ? part.v_cols : part.u_cols) = input_share(*this, role, rank);
      (low_rank ? part.after_v : part.after_u) = Exchange::kAllReduce;
    } else {
      part.u_rows = output_share(*this, role, rank);
    }
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_two_collective_plan(const ModelShape& model, int size) {
  return std::make_unique<TwoCollectivePlan>(model, size);
}

}  // namespace deinfer

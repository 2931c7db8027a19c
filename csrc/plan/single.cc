#include "plan/tensor_parallel_plan.h"

namespace deinfer {
namespace {

class SinglePlan final : public TensorParallelPlan {
 public:
  std::string_view name() const override { return "single"; }
  LinearPlacement place(LinearRole, const LinearShape& shape, int, int) const override {
    LinearPlacement whole;
    whole.v_rows = {0, shape.rank};
    whole.v_cols = {0, shape.k};
    whole.u_rows = {0, shape.n};
    whole.u_cols = {0, shape.rank > 0 ? shape.rank : shape.k};
    return whole;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_single_plan() { return std::make_unique<SinglePlan>(); }

}  // namespace deinfer

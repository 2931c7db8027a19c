// Megatron-LM's division (arXiv 1909.08053) of the undecomposed matrices: columns, then rows.
#include "plan/plans.h"

namespace deinfer {
namespace {

class DensePlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "dense"; }
  bool multiplies_out() const override { return true; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    const LinearShape product{shape.n, shape.k, 0};
    if (role == LinearRole::kHead) return place_head(*this, product, rank);
    LinearPlacement part = place_whole(product);
    if (adds_to_residual(role)) {
      part.u_cols = input_share(*this, role, rank);
      part.after_u = Exchange::kAllReduce;
    } else {
      part.u_rows = output_share(*this, role, rank);
    }
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_dense_plan(const ModelShape& model, int size) {
  return std::make_unique<DensePlan>(model, size);
}

}  // namespace deinfer

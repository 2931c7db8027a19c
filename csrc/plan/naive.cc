// The baseline of DeInfer's paper: every linear by itself, its rank dimension divided, its whole
// output summed; attention and KV cache are on every rank.
#include "plan/plans.h"

namespace deinfer {
namespace {

class NaivePlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "naive"; }
  bool merges_exchanges() const override { return false; }
  bool divides_heads() const override { return false; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    if (role == LinearRole::kHead) return place_head(*this, shape, rank);
    LinearPlacement part = place_whole(shape);
    if (shape.rank > 0) {
      part.v_rows = part.u_cols = split(shape.rank, size(), rank);
    } else {
      part.u_cols = split(shape.k, size(), rank, 16);
    }
    part.after_u = Exchange::kAllReduce;
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_naive_plan(const ModelShape& model, int size) {
  return std::make_unique<NaivePlan>(model, size);
}

}  // namespace deinfer

// Every rank has some columns of the residual stream, so that each weight is there exactly once and
// only z is summed. The norm's factor 1/rms is one number per token: it commutes with V and is
// applied to z. Training has known this as bottleneck-aware parallelism (BOOST, arXiv 2512.12131).
#include "plan/plans.h"

namespace deinfer {
namespace {

class HiddenShardedPlan final : public TensorParallelPlan {
 public:
  using TensorParallelPlan::TensorParallelPlan;
  std::string_view name() const override { return "hidden_sharded"; }
  ResidualLayout residual() const override { return ResidualLayout::kHiddenShards; }

  LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const override {
    if (role == LinearRole::kHead) return place_head(*this, shape, rank);
    LinearPlacement part = place_whole(shape);
    const bool low_rank = shape.rank > 0;
    if (adds_to_residual(role)) {
      if (low_rank) {
        part.v_cols = input_share(*this, role, rank);
        part.after_v = Exchange::kAllReduce;
        part.u_rows = hidden_share(rank);
      } else {
        part.u_cols = input_share(*this, role, rank);
        part.after_u = Exchange::kReduceScatter;
      }
      return part;
    }
    part.u_rows = output_share(*this, role, rank);
    if (low_rank) {
      part.v_cols = hidden_share(rank);
      part.after_v = Exchange::kAllReduce;
    } else {
      part.before = Exchange::kAllGather;
    }
    return part;
  }
};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_hidden_sharded_plan(const ModelShape& model, int size) {
  return std::make_unique<HiddenShardedPlan>(model, size);
}

}  // namespace deinfer

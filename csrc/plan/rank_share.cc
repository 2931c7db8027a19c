#include "plan/rank_share.h"

#include "base/check.h"

namespace deinfer {

StepPlans make_step_plans(std::string_view name, const ModelShape& model, int size) {
  std::shared_ptr<const TensorParallelPlan> plan = make_plan(name, model, size);
  return {plan, plan};
}

RankShare::RankShare(const StepPlans& step_plans, int own_rank)
    : plans(step_plans),
      rank(own_rank),
      size(step_plans[0]->size()),
      heads(step_plans[0]->heads(own_rank)) {
  const TensorParallelPlan& plan = *plans[0];
  const ModelShape& model = plan.model();
  // The columns of the MLP's inner activations on a rank are the outputs of up that it has, which
  // every plan chooses by role and size alone: any shape of up tells, here one of rank 1.
  LinearPlacement up =
      plan.place(LinearRole::kUp, {model.intermediate_size, model.hidden_size, 1}, rank);
  intermediate = up.u_rows.size();
  for (int r = 0; r < size; ++r) vocabularies.push_back(plan.vocab_share(r));
  for (std::size_t kind = 0; kind < kNumStepKinds; ++kind) {
    check_argument(plans[kind]->size() == size, "plans of ", size, " and of ", plans[kind]->size(),
                   " ranks cannot take turns");
    // What a single rank has is never a shard.
    residual[kind] = size == 1 ? ResidualLayout::kReplicated : plans[kind]->residual();
  }
  if (residual[0] != ResidualLayout::kHiddenShards) return;
  for (int r = 0; r < size; ++r) hidden.push_back(plan.hidden_share(r));
}

LinearPlacement RankShare::place(StepKind kind, LinearRole role, const LinearShape& shape,
                                 bool all_heads) const {
  LinearPlacement place =
      place_linear(*plans[static_cast<std::size_t>(kind)], role, shape, rank, all_heads);
  LinearPlacement first = place_linear(*plans[0], role, shape, rank, all_heads);
  check_argument(place.v_rows == first.v_rows && place.v_cols == first.v_cols &&
                     place.u_rows == first.u_rows && place.u_cols == first.u_cols,
                 "the plans ", plans[0]->name(), " and ", plans[1]->name(),
                 " place weights differently and cannot take turns");
  if (size == 1) place.before = place.after_v = place.after_u = Exchange::kNone;
  return place;
}

}  // namespace deinfer

// Which tensor-parallel plans an engine runs.
#pragma once

#include "deinfer/engine.h"
#include "model/model_config.h"
#include "plan/rank_share.h"

namespace deinfer {

struct PlanChoice {
  StepPlans plans;
  int prefill_chunks = 0;  // parts in which a long batch passes; 0: by length
};

/// The plan that `config` names, or for "auto" what the planner chooses for this machine, measured
/// in some milliseconds, with `threads` threads per rank. Throws kInvalidArgument for an unknown
/// name and more ranks than the model has attention heads.
PlanChoice choose_plans(const EngineConfig& config, const ModelConfig& model, int threads);

}  // namespace deinfer

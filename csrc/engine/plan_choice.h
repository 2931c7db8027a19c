// Which tensor-parallel plans an engine runs, and how it overlaps their exchanges.
#pragma once

#include <vector>

#include "deinfer/engine.h"
#include "deinfer/tensor.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "model/model_config.h"
#include "plan/cost_model.h"
#include "plan/rank_share.h"

namespace deinfer {

struct PlanChoice {
  StepPlans plans;
  StepChunks chunks;
  std::vector<KvForms> kv_forms = {};  // of every layer; none: all dense
};

/// What the engine runs on.
struct Machine {
  Hardware hardware;
  LinkModel link;  // between ranks
};

/// The type of the weights, which a device may decide. Throws as resolve_dtype().
DType weight_type(const EngineConfig& config, const ModelConfig& model);

/// How weights of type `dtype` are stored for the kernels of a CPU. Throws kInvalidArgument or
/// kUnsupported where config.weight_compression asks for what they cannot be.
cpu::WeightFormat weight_format(const EngineConfig& config, DType dtype,
                                const cpu::KernelTable& kernels);

/// This machine, measured in some tenths of a second, and the link that is emulated, or also
/// measured. `threads` per rank.
Machine measure_machine(const EngineConfig& config, const ModelConfig& model, int threads);

/// The plan that `config` names, or for "auto" what the planner chooses for this machine, measured
/// in some tenths of a second, with `threads` threads per rank; and config.exchange_chunks, or what
/// the cost model finds best for the plan. Throws kInvalidArgument for an unknown name and more
/// ranks than the model has attention heads.
PlanChoice choose_plans(const EngineConfig& config, const ModelConfig& model, int threads);

}  // namespace deinfer

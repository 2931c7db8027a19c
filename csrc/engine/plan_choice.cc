#include "engine/plan_choice.h"

#include "base/cpu_features.h"
#include "comm/link_model.h"
#include "engine/calibration.h"
#include "model/planned_model.h"
#include "plan/planner.h"

namespace deinfer {
namespace {

// What the plans are chosen for: decoding of few and of many sequences, and prompts.
constexpr int kBatches[] = {1, 16, 64};
constexpr int kContext = 512;
constexpr int kMaxChunks = 4;

DType weight_type(const std::string& dtype) {
  if (dtype == "float32") return DType::kFloat32;
  return dtype == "int8" ? DType::kInt8 : DType::kBFloat16;  // "auto" is bf16 for most checkpoints
}

}  // namespace

PlanChoice choose_plans(const EngineConfig& config, const ModelConfig& model, int threads) {
  const std::string& name = config.tensor_parallel_plan;
  int size = config.tensor_parallel_size;
  ModelShape shape = model_shape(model);
  PlanChoice choice;
  choice.prefill_chunks = config.exchange_chunks;
  // Between threads of one process there is next to nothing to hide.
  if (choice.prefill_chunks == 0 && config.emulated_link.empty()) choice.prefill_chunks = 1;
  // For one rank all plans are the same.
  choice.plans = make_step_plans(name == "auto" ? "hidden_sharded" : name, shape, size);
  if (name != "auto" || size == 1) return choice;

  DType dtype = weight_type(config.dtype);
  PlannerOptions options;
  options.size = size;
  options.link = config.emulated_link.empty() ? measure_local_link(size)
                                              : parse_link_model(config.emulated_link);
  options.hardware = measure_hardware(cpu::kernels_for(select_isa()), dtype, size, threads);
  options.batches.assign(std::begin(kBatches), std::end(kBatches));
  options.prefill = {config.max_num_batched_tokens};
  options.context = kContext;
  options.max_chunks = config.exchange_chunks > 0 ? 1 : kMaxChunks;
  std::string_view planned = dtype == DType::kFloat32 ? "float32"
                             : dtype == DType::kInt8  ? "int8"
                                                      : "bfloat16";
  PlanReport report = choose_plan(planned_model(model, 0.0, planned), options);
  choice.plans = {make_plan(report.decode_plan, shape, size),
                  make_plan(report.prefill_plan, shape, size)};
  for (const PlanEstimate& plan : report.plans) {
    if (plan.plan != report.prefill_plan || config.exchange_chunks > 0) continue;
    choice.prefill_chunks = plan.phases.back().chunks;
  }
  return choice;
}

}  // namespace deinfer

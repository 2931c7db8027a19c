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

DType weight_type(const std::string& dtype) {
  if (dtype == "float32") return DType::kFloat32;
  return dtype == "int8" ? DType::kInt8 : DType::kBFloat16;  // "auto" is bf16 for most checkpoints
}

}  // namespace

StepPlans choose_plans(const EngineConfig& config, const ModelConfig& model, int threads) {
  const std::string& name = config.tensor_parallel_plan;
  int size = config.tensor_parallel_size;
  if (name != "auto") return make_step_plans(name, model_shape(model), size);
  // For one rank all plans are the same.
  if (size == 1) return make_step_plans("hidden_sharded", model_shape(model), size);
  make_plan("hidden_sharded", model_shape(model), size);  // too many ranks end here
  DType dtype = weight_type(config.dtype);
  PlannerOptions options;
  options.size = size;
  options.link = config.emulated_link.empty() ? measure_local_link(size)
                                              : parse_link_model(config.emulated_link);
  options.hardware = measure_hardware(cpu::kernels_for(select_isa()), dtype, size, threads);
  options.batches.assign(std::begin(kBatches), std::end(kBatches));
  options.prefill = {config.max_num_batched_tokens};
  options.context = kContext;
  std::string_view planned = dtype == DType::kFloat32 ? "float32"
                             : dtype == DType::kInt8  ? "int8"
                                                      : "bfloat16";
  PlanReport report = choose_plan(planned_model(model, 0.0, planned), options);
  ModelShape shape = model_shape(model);
  return {make_plan(report.decode_plan, shape, size), make_plan(report.prefill_plan, shape, size)};
}

}  // namespace deinfer

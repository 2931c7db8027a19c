#include "engine/plan_choice.h"

#include <algorithm>

#include "base/check.h"
#include "base/cpu_features.h"
#include "comm/link_model.h"
#include "engine/calibration.h"
#include "engine/device.h"
#include "model/loader.h"
#include "model/planned_model.h"
#include "plan/planner.h"

namespace deinfer {
namespace {

// What the plans are chosen for: decoding of few and of many sequences, and prompts.
constexpr int kBatches[] = {1, 16, 64};
constexpr int kContext = 512;

/// Between threads of one process there is next to nothing to hide.
bool predicts_chunks(const EngineConfig& config) {
  return config.exchange_chunks == 0 && !config.emulated_link.empty();
}

PlanReport predict(const EngineConfig& config, const ModelConfig& model, int threads) {
  const Machine machine = measure_machine(config, model, threads);
  PlannerOptions options;
  options.size = config.tensor_parallel_size;
  options.link = machine.link;
  options.hardware = machine.hardware;
  options.batches.assign(std::begin(kBatches), std::end(kBatches));
  options.prefill = {config.max_num_batched_tokens};
  options.context = kContext;
  options.max_chunks = predicts_chunks(config) ? kMaxPlannedChunks : 1;
  return choose_plan(planned_model(model, 0.0, dtype_name(weight_type(config, model))), options);
}

/// Those predicted for `plan`.
ExchangeChunks predicted_chunks(const PlanReport& report, std::string_view plan, bool prefill) {
  auto found = std::find_if(report.plans.begin(), report.plans.end(),
                            [&](const PlanEstimate& estimate) { return estimate.plan == plan; });
  ExchangeChunks chunks;
  for (std::size_t i = 0; i < found->phases.size(); ++i) {
    const bool decode = i < std::size(kBatches);
    if (decode == prefill) continue;
    chunks.sizes.push_back({decode ? kBatches[i] : 0, found->phases[i].chunks});
  }
  return chunks;
}

}  // namespace

DType weight_type(const EngineConfig& config, const ModelConfig& model) {
  if (choose_device(config.device).is_cuda) {  // whatever the checkpoint has
    return config.dtype == "int8" ? DType::kInt8 : DType::kBFloat16;
  }
  return resolve_dtype(config.dtype, open_weights(config.model, model), model);
}

cpu::WeightFormat weight_format(const EngineConfig& config, DType dtype,
                                const cpu::KernelTable& kernels) {
  const bool asked = config.weight_compression == "lossless";
  check_argument(!asked || dtype == DType::kBFloat16, "weight_compression=\"lossless\" is of ",
                 "bfloat16 weights; these are ", dtype_name(dtype));
  const bool able = dtype == DType::kBFloat16 && kernels.panel_gemm_compressed != nullptr;
  if (asked && !able) {
    fail(ErrorCode::kUnsupported, "weight_compression=\"lossless\": there are no kernels for it ",
         "in ", isa_name(kernels.isa), " (avx2 and avx512_bf16 have them)");
  }
  const bool pays = config.max_num_seqs <= kernels.compressed_tokens;
  return {dtype, asked || (able && pays && config.weight_compression != "none")};
}

Machine measure_machine(const EngineConfig& config, const ModelConfig& model, int threads) {
  const int size = config.tensor_parallel_size;
  Machine machine;
  if (choose_device(config.device).is_cuda) {  // not measured: as an H100 would be
    machine.link = parse_link_model("nvlink");
    machine.hardware = parse_hardware("h100");
  } else {
    machine.link = measure_local_link(size);
    const cpu::KernelTable& kernels = cpu::kernels_for(select_isa());
    machine.hardware = measure_hardware(
        kernels, weight_format(config, weight_type(config, model), kernels), size, threads);
  }
  if (!config.emulated_link.empty()) {  // takes its time besides that of the real one
    machine.hardware.exchange_s = machine.link.latency_s;
    machine.hardware.received_bytes_per_s = machine.link.bytes_per_s;
    machine.link = parse_link_model(config.emulated_link);
  }
  return machine;
}

PlanChoice choose_plans(const EngineConfig& config, const ModelConfig& model, int threads) {
  const std::string& name = config.tensor_parallel_plan;
  const bool automatic = name == "auto";
  const int size = config.tensor_parallel_size;
  const ModelShape shape = model_shape(model);
  // For one rank all plans are the same.
  PlanChoice choice{make_step_plans(automatic ? "hidden_sharded" : name, shape, size), {}, {}};
  const int chunks = std::max(config.exchange_chunks, 1);
  for (ExchangeChunks& kind : choice.chunks) kind.sizes = {{0, chunks}};
  if (size == 1 || (!automatic && !predicts_chunks(config))) return choice;

  const PlanReport report = predict(config, model, threads);
  if (automatic) {
    choice.plans = {make_plan(report.decode_plan, shape, size),
                    make_plan(report.prefill_plan, shape, size)};
  }
  for (std::size_t kind = 0; kind < kNumStepKinds; ++kind) {
    choice.chunks[kind] = predicted_chunks(report, choice.plans[kind]->name(), kind == 1);
  }
  return choice;
}

}  // namespace deinfer

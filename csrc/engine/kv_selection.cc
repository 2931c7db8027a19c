#include "engine/kv_selection.h"

#include <algorithm>
#include <set>

#include "base/buffer.h"
#include "base/check.h"
#include "engine/cuda_worker.h"
#include "engine/device.h"
#include "kernels/cuda/runtime.h"
#include "model/planned_model.h"

namespace deinfer {
namespace {

constexpr int kContext = 512;  // as plans are chosen for

/// Bytes for the KV caches of all ranks, once their weights are loaded.
std::uint64_t kv_memory(const EngineConfig& config, std::uint64_t weights) {
  auto left = [&](std::uint64_t memory) { return memory - std::min(memory, weights); };
  const std::vector<int> ranks = choose_devices(config.device, config.tensor_parallel_size);
  if (ranks.empty()) return kv_share(left(available_memory()));
  std::uint64_t memory = 0;
  for (const int device : std::set<int>(ranks.begin(), ranks.end())) {
    cuda::use_device(device);
    memory += cuda::free_memory();
  }
  return cuda_kv_share(left(memory));
}

KvDemand demand_of(const EngineConfig& config, const PlannedModel& model,
                   const TensorParallelPlan& plan, int max_model_len) {
  KvDemand demand;
  demand.context = std::min(kContext, max_model_len);
  demand.max_sequences = config.max_num_seqs;
  if (config.num_kv_blocks > 0) {
    demand.tokens = config.num_kv_blocks * config.block_size;
    return demand;
  }
  const auto ranks = static_cast<std::uint64_t>(plan.size());
  demand.bytes = config.kv_cache_bytes / ranks;
  if (demand.bytes > 0) return demand;
  std::uint64_t weights = 0;
  for (int rank = 0; rank < plan.size(); ++rank) weights += rank_weight_bytes(model, plan, rank);
  demand.bytes = kv_memory(config, weights) / ranks;
  return demand;
}

}  // namespace

KvChoice select_kv_forms(const EngineConfig& config, const ModelConfig& model,
                         const StepPlans& plans, int threads, int max_model_len) {
  const bool on_cuda = choose_device(config.device).is_cuda;
  std::string_view latents = config.kv_latents;
  if (on_cuda && config.tensor_parallel_size > 1) {
    if (latents == "token_sharded") {
      fail(ErrorCode::kUnsupported, "kv_latents=\"token_sharded\": on CUDA devices every rank has ",
           "the latents of all tokens");
    }
    latents = "replicated";
  }
  const PlannedModel planned = planned_model(model, 0.0, dtype_name(weight_type(config, model)));
  const TensorParallelPlan& plan = *plans[0];
  Machine machine;
  const bool compares = config.tensor_parallel_size > 1 && latents == "auto";
  if (config.kv_cache == "auto" || compares) {
    machine = measure_machine(config, model, threads);
  }
  return choose_kv_forms({config.kv_cache, latents}, planned, plan, machine.hardware, machine.link,
                         demand_of(config, planned, plan, max_model_len));
}

void fit_blocks(const std::vector<KvForms>& forms, EngineConfig& config) {
  if (std::none_of(forms.begin(), forms.end(),
                   [](const KvForms& layer) { return layer.token_sharded; })) {
    return;
  }
  constexpr int kRun = 16;  // tokens that the layout of K keeps together
  const int unit = kRun * config.tensor_parallel_size;
  const int size = (config.block_size + unit - 1) / unit * unit;
  config.num_kv_blocks = (config.num_kv_blocks * config.block_size + size - 1) / size;
  config.block_size = size;
}

}  // namespace deinfer

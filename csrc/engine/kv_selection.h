// What an engine's KV cache keeps of every layer.
#pragma once

#include "deinfer/engine.h"
#include "engine/plan_choice.h"
#include "plan/kv_choice.h"

namespace deinfer {

/// The forms that config.kv_cache and config.kv_latents ask for, or for "auto" those of the best
/// predicted throughput on this machine: a CPU is measured in some tenths of a second, a CUDA
/// device taken for what plans take it for. (Plans that take turns have the same weights, and
/// either both or none have latents.) Throws as choose_kv_forms(), and kUnsupported for
/// token-sharded latents on CUDA devices, which "auto" there does not choose.
KvChoice select_kv_forms(const EngineConfig& config, const ModelConfig& model,
                         const StepPlans& plans, int threads, int max_model_len);

/// Where ranks divide the tokens, makes config's blocks as large as that needs, 16 tokens for every
/// rank, and num_kv_blocks so many that they hold no fewer tokens.
void fit_blocks(const std::vector<KvForms>& forms, EngineConfig& config);

}  // namespace deinfer

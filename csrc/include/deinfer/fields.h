// The fields of the structs that configure deinfer, by name: for bindings to other languages.
#pragma once

#include "deinfer/engine.h"
#include "deinfer/planner.h"
#include "deinfer/sampling_params.h"

namespace deinfer {
inline namespace DEINFER_ABI {

/// visit_fields<T>(visitor) calls visitor("name", &T::name) for every field of T, in the order of
/// its declaration.
template <typename T, typename Visitor>
void visit_fields(Visitor&& visitor);

template <typename Visitor>
void visit_fields(SamplingParams*, Visitor&& visitor) {
  using T = SamplingParams;
  visitor("n", &T::n);
  visitor("max_tokens", &T::max_tokens);
  visitor("min_tokens", &T::min_tokens);
  visitor("temperature", &T::temperature);
  visitor("top_p", &T::top_p);
  visitor("top_k", &T::top_k);
  visitor("min_p", &T::min_p);
  visitor("repetition_penalty", &T::repetition_penalty);
  visitor("presence_penalty", &T::presence_penalty);
  visitor("frequency_penalty", &T::frequency_penalty);
  visitor("seed", &T::seed);
  visitor("stop_token_ids", &T::stop_token_ids);
  visitor("ignore_eos", &T::ignore_eos);
  visitor("logprobs", &T::logprobs);
  visitor("prompt_logprobs", &T::prompt_logprobs);
  visitor("prompt_logits", &T::prompt_logits);
  visitor("hidden_states", &T::hidden_states);
  visitor("priority", &T::priority);
  visitor("expected_tokens", &T::expected_tokens);
}

template <typename Visitor>
void visit_fields(EngineConfig*, Visitor&& visitor) {
  using T = EngineConfig;
  visitor("model", &T::model);
  visitor("device", &T::device);
  visitor("dtype", &T::dtype);
  visitor("weight_compression", &T::weight_compression);
  visitor("tensor_parallel_size", &T::tensor_parallel_size);
  visitor("tensor_parallel_plan", &T::tensor_parallel_plan);
  visitor("emulated_link", &T::emulated_link);
  visitor("exchange_chunks", &T::exchange_chunks);
  visitor("num_threads", &T::num_threads);
  visitor("max_model_len", &T::max_model_len);
  visitor("max_num_seqs", &T::max_num_seqs);
  visitor("max_num_batched_tokens", &T::max_num_batched_tokens);
  visitor("block_size", &T::block_size);
  visitor("num_kv_blocks", &T::num_kv_blocks);
  visitor("kv_cache_bytes", &T::kv_cache_bytes);
  visitor("kv_cache", &T::kv_cache);
  visitor("kv_latents", &T::kv_latents);
  visitor("scheduling_policy", &T::scheduling_policy);
  visitor("admission", &T::admission);
  visitor("safety", &T::safety);
  visitor("kv_watermark", &T::kv_watermark);
  visitor("max_pause", &T::max_pause);
  visitor("preempt_limit", &T::preempt_limit);
  visitor("promote_after", &T::promote_after);
  visitor("promote_per_token", &T::promote_per_token);
  visitor("bucket_width", &T::bucket_width);
  visitor("static_group", &T::static_group);
  visitor("static_batch_size", &T::static_batch_size);
  visitor("bucket_batch_sizes", &T::bucket_batch_sizes);
  visitor("recompute", &T::recompute);
  visitor("event_log", &T::event_log);
  visitor("enable_prefix_caching", &T::enable_prefix_caching);
  visitor("hidden_state_layers", &T::hidden_state_layers);
  visitor("length_predictor", &T::length_predictor);
  visitor("seed", &T::seed);
}

template <typename Visitor>
void visit_fields(PlannerConfig*, Visitor&& visitor) {
  using T = PlannerConfig;
  visitor("model", &T::model);
  visitor("tensor_parallel_size", &T::tensor_parallel_size);
  visitor("link", &T::link);
  visitor("hardware", &T::hardware);
  visitor("dtype", &T::dtype);
  visitor("keep", &T::keep);
  visitor("memory_gib", &T::memory_gib);
  visitor("context", &T::context);
  visitor("batches", &T::batches);
  visitor("prefill", &T::prefill);
  visitor("mix", &T::mix);
  visitor("kv_cache", &T::kv_cache);
  visitor("kv_latents", &T::kv_latents);
  visitor("max_chunks", &T::max_chunks);
}

template <typename T, typename Visitor>
void visit_fields(Visitor&& visitor) {
  visit_fields(static_cast<T*>(nullptr), visitor);
}

}  // namespace DEINFER_ABI
}  // namespace deinfer

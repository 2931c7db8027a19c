#include "engine/scheduler_setup.h"

#include <utility>

namespace deinfer {

SchedulerSetup scheduler_setup(const EngineConfig& config, std::int64_t num_blocks,
                               std::vector<int> step_sizes) {
  SchedulerSetup setup;
  SchedulerConfig& scheduler = setup.config;
  scheduler.max_num_seqs = config.max_num_seqs;
  scheduler.max_num_batched_tokens = config.max_num_batched_tokens;
  scheduler.block_size = config.block_size;
  scheduler.num_blocks = static_cast<int>(num_blocks);
  scheduler.enable_prefix_caching = config.enable_prefix_caching;
  scheduler.admission = parse_admission(config.admission);
  scheduler.safety = config.safety;
  scheduler.watermark = config.kv_watermark;
  scheduler.max_pause = config.max_pause;
  scheduler.preempt_limit = config.preempt_limit;
  scheduler.graph_sizes = std::move(step_sizes);
  scheduler.promotion = default_promotion(config.scheduling_policy);
  Promotion& promotion = scheduler.promotion;
  promotion.after_s = config.promote_after.value_or(promotion.after_s);
  promotion.per_token_s = config.promote_per_token.value_or(promotion.per_token_s);
  setup.policy = config.scheduling_policy;
  setup.policy_config.bucket_width = config.bucket_width;
  StaticBatchConfig& batches = setup.policy_config.static_batches;
  batches.group = config.static_group;
  batches.batch_size = config.static_batch_size;
  batches.bucket_tokens = config.bucket_width;
  batches.bucket_batch_sizes = config.bucket_batch_sizes;
  batches.restart_failures = config.recompute == "restart";
  return setup;
}

}  // namespace deinfer

#include <cmath>

#include "base/check.h"
#include "comm/link_model.h"
#include "deinfer/engine.h"
#include "engine/device.h"
#include "plan/kv_choice.h"
#include "scheduler/scheduling_policy.h"

namespace deinfer {

void EngineConfig::validate() const {
  check_argument(!model.empty(), "model is empty: it names a checkpoint directory");
  choose_device(device);
  check_argument(dtype == "auto" || dtype == "float32" || dtype == "bfloat16" || dtype == "int8",
                 "dtype=\"", dtype,
                 "\" is unknown; use \"auto\", \"float32\", \"bfloat16\" or \"int8\"");
  check_argument(weight_compression == "auto" || weight_compression == "lossless" ||
                     weight_compression == "none",
                 "weight_compression=\"", weight_compression,
                 "\" is unknown; use \"auto\", \"lossless\" or \"none\"");
  check_argument(tensor_parallel_size >= 1, "tensor_parallel_size must be at least 1, got ",
                 tensor_parallel_size);
  if (!emulated_link.empty()) parse_link_model(emulated_link);
  check_argument(exchange_chunks >= 0 && exchange_chunks <= 64,
                 "exchange_chunks must be in [0, 64], got ", exchange_chunks);
  check_argument(num_threads >= 0 && num_threads <= 1024, "num_threads must be in [0, 1024], got ",
                 num_threads);
  check_argument(max_model_len >= 0, "max_model_len must be at least 0, got ", max_model_len);
  check_argument(max_num_seqs >= 1, "max_num_seqs must be at least 1, got ", max_num_seqs);
  check_argument(max_num_batched_tokens >= 1 && max_num_batched_tokens <= 1 << 20,
                 "max_num_batched_tokens must be in [1, 1048576], got ", max_num_batched_tokens);
  check_argument(block_size >= 16 && block_size % 16 == 0 && block_size <= 4096,
                 "block_size must be a multiple of 16 in [16, 4096], got ", block_size);
  check_argument(num_kv_blocks >= 0 && num_kv_blocks <= 1 << 30,
                 "num_kv_blocks must be in [0, 2^30], got ", num_kv_blocks);
  KvRequest{kv_cache, kv_latents}.validate();
  parse_admission(admission);
  // Written so that NaN fails.
  check_argument(safety >= 0.0 && safety <= 1.0, "safety must be in [0, 1], got ", safety);
  check_argument(kv_watermark >= 0.0 && kv_watermark < 1.0, "kv_watermark must be in [0, 1), got ",
                 kv_watermark);
  check_argument(max_pause >= 0, "max_pause must be at least 0, got ", max_pause);
  check_argument(preempt_limit >= 0, "preempt_limit must be at least 0, got ", preempt_limit);
  const auto check_wait = [](const char* name, const std::optional<double>& seconds) {
    check_argument(!seconds || (*seconds >= 0.0 && std::isfinite(*seconds)), name,
                   " must be a finite number of seconds >= 0, got ", seconds.value_or(0.0));
  };
  check_wait("promote_after", promote_after);
  check_wait("promote_per_token", promote_per_token);
  check_argument(bucket_width >= 1, "bucket_width must be at least 1, got ", bucket_width);
  check_argument(static_group >= 1, "static_group must be at least 1, got ", static_group);
  check_argument(static_batch_size >= 1, "static_batch_size must be at least 1, got ",
                 static_batch_size);
  for (const int size : bucket_batch_sizes) {
    check_argument(size >= 1, "bucket_batch_sizes must be at least 1, got ", size);
  }
  check_argument(recompute == "continue" || recompute == "restart",
                 "recompute must be continue or restart, got ", recompute);
}

}  // namespace deinfer

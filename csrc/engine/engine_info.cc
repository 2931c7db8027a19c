#include "engine/engine_info.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {

std::int64_t choose_kv_blocks(const EngineConfig& config, RankGroup& ranks, int max_model_len) {
  if (config.num_kv_blocks > 0) return config.num_kv_blocks;
  const std::uint64_t block_bytes = ranks.kv_block_bytes();
  std::int64_t blocks = ranks.kv_blocks_that_fit();
  if (config.kv_cache_bytes > 0) {
    blocks = static_cast<std::int64_t>(config.kv_cache_bytes / block_bytes);
  }
  if (config.kv_cache_bytes > 0 && blocks == 0) {
    fail(ErrorCode::kInvalidArgument, "kv_cache_bytes=", config.kv_cache_bytes,
         " is less than one KV block of ", block_bytes, " bytes");
  }
  std::int64_t per_sequence = (max_model_len + config.block_size - 1) / config.block_size;
  return std::clamp<std::int64_t>(blocks, 1, per_sequence * config.max_num_seqs);
}

ModelInfo describe_model(const EngineConfig& config, const ModelConfig& model, RankGroup& ranks,
                         int max_model_len, std::int64_t num_kv_blocks) {
  Worker& worker = ranks.rank(0);
  ModelInfo info;
  const WeightsInfo weights = worker.weights_info();
  info.architecture = model.model_type;
  info.dtype = dtype_name(weights.format.dtype);
  info.weight_compression = weights.format.compressed ? "lossless" : "none";
  info.isa = isa_name(worker.kernels().isa);
  info.num_layers = model.num_layers;
  info.hidden_size = model.hidden_size;
  info.vocab_size = model.vocab_size;
  info.max_model_len = max_model_len;
  info.num_threads = worker.num_threads();
  info.parameters = weights.parameters;
  info.tensor_parallel_size = ranks.size();
  info.decode_plan = ranks.plans()[0]->name();
  info.prefill_plan = ranks.plans()[1]->name();
  for (int rank = 0; rank < ranks.size(); ++rank) {
    info.rank_weight_bytes.push_back(ranks.rank(rank).weights_info().bytes);
    info.weight_bytes += info.rank_weight_bytes.back();
  }
  info.num_kv_blocks = num_kv_blocks;
  info.block_size = config.block_size;
  std::uint64_t block_bytes = 0;
  for (int rank = 0; rank < ranks.size(); ++rank) {
    KvInfo kv = ranks.rank(rank).kv_info();
    info.kv_cache_bytes += kv.pool_bytes;
    block_bytes += kv.block_bytes;
    info.dense_kv_bytes_per_token += kv.dense_bytes_per_token;
    if (rank == 0) info.kv_layers = std::move(kv.layers);
  }
  info.kv_bytes_per_token = block_bytes / static_cast<std::uint64_t>(config.block_size);
  info.kv_cache = config.kv_cache;
  info.lowrank_matrices = weights.lowrank_matrices;
  info.dense_matrices = weights.dense_matrices;
  return info;
}

std::vector<CollectiveStats> collective_stats(const Communicator& communicator) {
  std::vector<CollectiveStats> stats;
  for (std::size_t i = 0; i < kNumCollectives; ++i) {
    const TrafficCounter& counter = communicator.traffic()[i];
    if (counter.calls == 0) continue;
    stats.push_back({collective_name(static_cast<Collective>(i)), counter.calls, counter.bytes,
                     counter.wire_bytes});
  }
  return stats;
}

}  // namespace deinfer

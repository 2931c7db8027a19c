// Tensor-parallel ranks without an engine around them, and batches to run on them.
#pragma once

#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/rank_group.h"
#include "model/planned_model.h"
#include "tiny_model.h"

namespace deinfer::test {

inline constexpr int kKvBlocks = 128;  // 16 sequences
inline constexpr int kBlockSize = 16;
inline constexpr int kBlocksPerSequence = 8;

/// The ranks of `config`, with a KV cache in these forms.
inline std::unique_ptr<RankGroup> make_ranks(const EngineConfig& config, const StepPlans& plans,
                                             int threads = 1, const LoadProgress& progress = {},
                                             const CommunicatorWrapper& wrap = {},
                                             const std::vector<KvForms>& kv_forms = {}) {
  ModelConfig model = read_model_config(config.model);
  PlanChoice choice{plans, {}, kv_forms};
  for (ExchangeChunks& chunks : choice.chunks) chunks.sizes = {{0, config.exchange_chunks}};
  auto ranks = std::make_unique<RankGroup>(config, model, choice, threads,
                                           model.max_position_embeddings, progress, wrap);
  ranks->allocate_kv_cache(kKvBlocks);
  return ranks;
}

inline std::unique_ptr<RankGroup> make_ranks(const EngineConfig& config, int threads = 1,
                                             const LoadProgress& progress = {},
                                             const CommunicatorWrapper& wrap = {}) {
  return make_ranks(
      config,
      make_step_plans(config.tensor_parallel_plan, model_shape(read_model_config(config.model)),
                      config.tensor_parallel_size),
      threads, progress, wrap);
}

/// One batch on a RankGroup or a Worker.
template <typename Ranks>
std::span<const TokenId> execute(
    Ranks& ranks, const Batch& batch,
    const Worker::LogitsConsumer& consume = [](TeamMember&, int, int, float*) {}) {
  ranks.start(batch);
  return ranks.finish(consume);
}

/// The next tokens of sequences: `lengths[i]` of sequence i, after `computed[i]` others (none). Of
/// each the last row is wanted: its most likely token, or its logits for every second sequence.
class RankBatch {
 public:
  explicit RankBatch(const std::vector<int>& lengths, std::vector<int> computed = {},
                     int block_size = kBlockSize) {
    computed.resize(lengths.size());
    tables_.reserve(lengths.size());
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      std::vector<std::int32_t>& table = tables_.emplace_back(kBlocksPerSequence);
      std::iota(table.begin(), table.end(), static_cast<std::int32_t>(i) * kBlocksPerSequence);
      batch.sequences.push_back({batch.num_tokens(), lengths[i], computed[i], table.data()});
      for (int token = 0; token < lengths[i]; ++token) {
        int position = computed[i] + token;
        batch.token_ids.push_back(static_cast<TokenId>((7 * batch.num_tokens() + 3) % 97));
        batch.positions.push_back(position);
        batch.slots.push_back(
            {table[static_cast<std::size_t>(position / block_size)], position % block_size});
      }
      (i % 2 == 0 ? batch.argmax_rows : batch.logit_rows).push_back(batch.num_tokens() - 1);
    }
  }
  RankBatch(RankBatch&&) = default;

  Batch batch;

 private:
  std::vector<std::vector<std::int32_t>> tables_;
};

}  // namespace deinfer::test

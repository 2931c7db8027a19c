// Tensor-parallel ranks without an engine around them, and batches to run on them.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/rank_group.h"
#include "model/planned_model.h"
#include "tiny_model.h"

namespace deinfer::test {

inline constexpr int kKvBlocks = 128;
inline constexpr int kBlockSize = 16;

/// The ranks of `config`, with a KV cache.
inline std::unique_ptr<RankGroup> make_ranks(const EngineConfig& config, int threads = 1,
                                             const LoadProgress& progress = {},
                                             const CommunicatorWrapper& wrap = {}) {
  ModelConfig model = read_model_config(config.model);
  StepPlans plans =
      make_step_plans(config.tensor_parallel_plan, model_shape(model), config.tensor_parallel_size);
  auto ranks = std::make_unique<RankGroup>(config, model, plans, threads,
                                           model.max_position_embeddings, progress, wrap);
  ranks->allocate_kv_cache(kKvBlocks);
  return ranks;
}

/// Sequences of the given lengths from position 0. Of every sequence, the last row is wanted: its
/// most likely token, or its logits for every second sequence.
class RankBatch {
 public:
  explicit RankBatch(const std::vector<int>& lengths) {
    blocks_.reserve(lengths.size());
    std::int32_t next_block = 0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      std::vector<std::int32_t>& table = blocks_.emplace_back();
      for (int token = 0; token < lengths[i]; token += kBlockSize) table.push_back(next_block++);
      batch.sequences.push_back({batch.num_tokens(), lengths[i], 0, table.data()});
      for (int position = 0; position < lengths[i]; ++position) {
        batch.token_ids.push_back(static_cast<TokenId>((7 * batch.num_tokens() + 3) % 97));
        batch.positions.push_back(position);
        batch.slots.push_back(
            {table[static_cast<std::size_t>(position / kBlockSize)], position % kBlockSize});
      }
      (i % 2 == 0 ? batch.argmax_rows : batch.logit_rows).push_back(batch.num_tokens() - 1);
    }
  }
  RankBatch(RankBatch&&) = default;

  Batch batch;

 private:
  std::vector<std::vector<std::int32_t>> blocks_;
};

}  // namespace deinfer::test

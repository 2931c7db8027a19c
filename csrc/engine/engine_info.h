// What an engine says of itself, and how it sizes its KV pool.
#pragma once

#include <cstdint>
#include <vector>

#include "deinfer/engine.h"
#include "engine/rank_group.h"

namespace deinfer {

/// Blocks of the KV pool: as configured, else from bytes, but no more than all seats can fill.
/// Throws kInvalidArgument when the configured bytes hold none.
std::int64_t choose_kv_blocks(const EngineConfig& config, RankGroup& ranks, int max_model_len);

/// What `ranks` have loaded, and their KV pool of `num_kv_blocks`, which must be allocated.
ModelInfo describe_model(const EngineConfig& config, const ModelConfig& model, RankGroup& ranks,
                         int max_model_len, std::int64_t num_kv_blocks);

/// The kinds of exchanges that one rank has made.
std::vector<CollectiveStats> collective_stats(const Communicator& communicator);

}  // namespace deinfer

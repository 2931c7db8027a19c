// What an engine says of itself, and how it sizes its KV pool.
#pragma once

#include <cstdint>
#include <vector>

#include "deinfer/engine.h"
#include "engine/rank_group.h"

namespace deinfer {

/// What the kernel says can be taken without swapping; 0 where it does not say.
std::uint64_t available_memory();

/// The part of it that the KV pool takes unless told otherwise.
constexpr std::uint64_t kv_share(std::uint64_t memory) { return memory / 4; }

/// Blocks of the KV pool: as configured, else from bytes, but no more than all seats can fill.
/// `block_bytes` is the size of a block on all ranks together. Throws kInvalidArgument when the
/// configured bytes hold none.
std::int64_t choose_kv_blocks(const EngineConfig& config, std::uint64_t block_bytes,
                              int max_model_len);

/// What `ranks` have loaded, and their KV pool of `num_kv_blocks`, which must be allocated.
ModelInfo describe_model(const ModelConfig& model, RankGroup& ranks, int max_model_len,
                         std::int64_t num_kv_blocks);

/// The kinds of exchanges that one rank has made.
std::vector<CollectiveStats> collective_stats(const Communicator& communicator);

}  // namespace deinfer

// The scheduler that an engine's configuration asks for.
#pragma once

#include <cstdint>
#include <vector>

#include "deinfer/engine.h"
#include "scheduler/event_log_file.h"

namespace deinfer {

/// `config` must be valid; num_blocks: of the KV pool; step_sizes: as Worker says. Throws
/// Error(kInvalidArgument) naming an admission that is unknown.
SchedulerSetup scheduler_setup(const EngineConfig& config, std::int64_t num_blocks,
                               std::vector<int> step_sizes);

}  // namespace deinfer

// What this machine gives to each of several ranks, measured in some milliseconds at start-up, for
// the planner.
#pragma once

#include "deinfer/tensor.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "plan/cost_model.h"

namespace deinfer {

/// Rates of one rank's team of `threads` threads while all `ranks` teams are at work: weights of
/// `format` streamed by products of one token (in bytes that they would have uncompressed),
/// products of many tokens, attention of one token and of a prompt, barriers.
Hardware measure_hardware(const cpu::KernelTable& kernels, cpu::WeightFormat format, int ranks,
                          int threads);

/// The exchanges of ranks that are threads of this process.
LinkModel measure_local_link(int ranks);

}  // namespace deinfer

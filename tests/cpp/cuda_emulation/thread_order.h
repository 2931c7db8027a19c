// Orders in which an emulated device runs threads: results that differ have a data race.
#pragma once

#include "fibers.h"

namespace deinfer::test {

inline constexpr int kThreadOrders = 3;
// Of one step, and of exchanges among 8 ranks: what is quick here.
inline constexpr int kReplays = 5;
inline constexpr int kRankCounts[] = {3};
inline constexpr int kExchanges = 75;

/// Of grids that begin from now on; 0 is the usual one.
inline void set_thread_order(int order) {
  emulation::set_schedule(static_cast<emulation::Schedule>(order));
}

}  // namespace deinfer::test

// A real device runs threads as it likes: here, the same thing several times.
#pragma once

namespace deinfer::test {

inline constexpr int kThreadOrders = 20;
inline constexpr int kReplays = 1000;
inline constexpr int kRankCounts[] = {2, 4, 8};
inline constexpr int kExchanges = 100000;

inline void set_thread_order(int /*order*/) {}

}  // namespace deinfer::test

// What an exchange costs on a link: the alpha-beta model (Hockney 1994; Thakur, Rabenseifner and
// Gropp 2005 for collectives).
#pragma once

#include <cstdint>
#include <string_view>

#include "comm/communicator.h"

namespace deinfer {

struct LinkModel {
  double latency_s = 0;    // of one exchange with next to no data
  double bytes_per_s = 0;  // that a rank sends
};

/// Seconds of one exchange to which every rank contributes `bytes` (the largest contribution):
/// - all-reduce: the better of one shot, latency + (N-1) b / bandwidth, and two shots,
///   1.5 latency + 2 (N-1)/N b / bandwidth: the second phase waits for flags only;
/// - all-gather, gather and broadcast: latency + (N-1) b / bandwidth;
/// - reduce-scatter: latency + (N-1)/N b / bandwidth;
/// - barrier: latency.
/// 0 for one rank.
double exchange_seconds(const LinkModel& link, Collective kind, std::uint64_t bytes, int ranks);

/// The link called "nvlink", "pcie" or "ethernet", or "latency_us:GB_per_s" (1e9 bytes).
/// Throws kInvalidArgument naming the text.
LinkModel parse_link(std::string_view text);

}  // namespace deinfer

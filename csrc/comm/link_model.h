// What an exchange costs on an interconnect, for emulation and for planning.
#pragma once

#include <cstddef>
#include <string_view>

#include "comm/communicator.h"

namespace deinfer {

/// A link between any two ranks: seconds per exchange, and bytes per second and direction.
struct LinkModel {
  double latency_s = 0;
  double bytes_per_s = 0;
};

/// "nvlink" (6.5 us, 405 GB/s), "pcie" (20 us, 25 GB/s) or "ethernet" (100 Gbit/s: 30 us,
/// 12.5 GB/s), with the latencies of an exchange that is a step of its own, not fused into the
/// kernels around it (that would be "3:405" and "8:25"); or "latency_us:GB_per_s", e.g. "10:50",
/// with GB = 10^9 bytes. Throws kInvalidArgument naming the value that is wrong.
LinkModel parse_link_model(std::string_view text);

/// Throws kInvalidArgument naming `text` unless latency is finite and not negative, bandwidth
/// finite and positive.
void check_link(const LinkModel& link, std::string_view text);

/// Seconds from the last rank's start of an exchange to its end; `bytes` is one rank's
/// contribution. An all-reduce is the better of one shot (everyone sends all to everyone) and two
/// (a reduce-scatter and an all-gather, at 1.5 latencies). Broadcast and gather take as long as the
/// root's link. 0 for one rank.
double exchange_seconds(const LinkModel& link, Collective kind, std::size_t bytes, int ranks);

}  // namespace deinfer

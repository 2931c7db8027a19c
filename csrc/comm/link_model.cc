#include "comm/link_model.h"

#include <algorithm>
#include <array>

#include "plan/numbers.h"

namespace deinfer {
namespace {

struct Preset {
  std::string_view name;
  LinkModel link;
};

// nvlink: H100 SXM, 90 % of 450 GB/s; 6.5 us is what vLLM's and SGLang's own all-reduces take for
// small messages as kernels of their own (vLLM #24111, SGLang #2904). pcie: 4.0 x16 through the
// host, as NCCL does it. ethernet: 25 Gbit/s, TCP.
constexpr std::array kPresets = {
    Preset{"nvlink", {6.5e-6, 405e9}},
    Preset{"pcie", {20e-6, 25e9}},
    Preset{"ethernet", {50e-6, 2.9e9}},
};

constexpr double kTwoShotLatency = 1.5;

}  // namespace

double exchange_seconds(const LinkModel& link, Collective kind, std::uint64_t bytes, int ranks) {
  if (ranks <= 1) return 0;
  const double others = ranks - 1;
  const double per_rank = others / ranks;
  const double seconds = static_cast<double>(bytes) / link.bytes_per_s;
  switch (kind) {
    case Collective::kAllReduce:
      return std::min(link.latency_s + others * seconds,
                      kTwoShotLatency * link.latency_s + 2 * per_rank * seconds);
    case Collective::kReduceScatter: return link.latency_s + per_rank * seconds;
    case Collective::kAllGather:
    case Collective::kBroadcast:
    case Collective::kGather: return link.latency_s + others * seconds;
    case Collective::kBarrier: break;
  }
  return link.latency_s;
}

LinkModel parse_link(std::string_view text) {
  for (const Preset& preset : kPresets) {
    if (preset.name == text) return preset.link;
  }
  constexpr const char* kExpected = "nvlink, pcie, ethernet or latency_us:GB_per_s such as 6.5:405";
  const auto [latency_us, gigabytes] = parse_two_numbers("link", text, text, kExpected);
  return {latency_us * 1e-6, gigabytes * 1e9};
}

}  // namespace deinfer

#include "comm/link_model.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/number_pair.h"

namespace deinfer {
namespace {

struct Preset {
  std::string_view name;
  LinkModel link;
};
constexpr Preset kPresets[] = {
    {"nvlink", {6.5e-6, 405e9}},    // 90 % of 450 GB/s
    {"pcie", {20e-6, 25e9}},        // 4.0 x16
    {"ethernet", {30e-6, 12.5e9}},  // 100 Gbit/s
};

}  // namespace

void check_link(const LinkModel& link, std::string_view text) {
  check_argument(std::isfinite(link.latency_s) && link.latency_s >= 0, "link \"", text,
                 "\": the latency must be at least 0, got ", link.latency_s * 1e6, " us");
  check_argument(std::isfinite(link.bytes_per_s) && link.bytes_per_s > 0, "link \"", text,
                 "\": the bandwidth must be above 0, got ", link.bytes_per_s * 1e-9, " GB/s");
}

LinkModel parse_link_model(std::string_view text) {
  for (const Preset& preset : kPresets) {
    if (text == preset.name) return preset.link;
  }
  const std::optional<NumberPair> numbers = parse_number_pair(text);
  check_argument(numbers.has_value(), "link \"", text,
                 "\": must be nvlink, pcie, ethernet or \"latency_us:GB_per_s\"");
  check_argument(numbers->first.has_value(), "link \"", text,
                 "\": the latency in us is not a number: \"", numbers->first_text, "\"");
  check_argument(numbers->second.has_value(), "link \"", text,
                 "\": the bandwidth in GB/s is not a number: \"", numbers->second_text, "\"");
  LinkModel link{*numbers->first * 1e-6, *numbers->second * 1e9};
  check_link(link, text);
  return link;
}

double exchange_seconds(const LinkModel& link, Collective kind, std::size_t bytes, int ranks) {
  if (ranks <= 1) return 0;
  auto b = static_cast<double>(bytes);
  double n = ranks;
  double to_everyone = (n - 1) * b / link.bytes_per_s;
  double to_each_its_part = to_everyone / n;
  switch (kind) {
    case Collective::kAllReduce:
      return std::min(link.latency_s + to_everyone, 1.5 * link.latency_s + 2 * to_each_its_part);
    case Collective::kAllGather:
    case Collective::kBroadcast:
    case Collective::kGather: return link.latency_s + to_everyone;
    case Collective::kReduceScatter: return link.latency_s + to_each_its_part;
    case Collective::kBarrier: return link.latency_s;
  }
  return 0;
}

}  // namespace deinfer

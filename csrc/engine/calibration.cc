#include "engine/calibration.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "base/buffer.h"
#include "base/thread_team.h"
#include "comm/local.h"

namespace deinfer {
namespace {

constexpr int kColumns = 2048;
constexpr int kTokens = 128;
constexpr std::size_t kStreamBytes = std::size_t{96} << 20;  // beyond the caches
constexpr int kProducts = 24;                                // of kTokens tokens, per thread
constexpr int kBarriers = 200;
constexpr int kExchanges = 50;
constexpr std::size_t kLargeExchange = std::size_t{1} << 20;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Seconds of f(member) on the whole team, from barrier to barrier.
template <typename F>
double timed(ThreadTeam& team, F f) {
  double seconds = 0.0;
  team.run([&](TeamMember& member) {
    member.barrier();
    auto start = std::chrono::steady_clock::now();
    f(member);
    member.barrier();
    if (member.id() == 0) seconds = seconds_since(start);
  });
  return std::max(seconds, 1e-9);
}

}  // namespace

Hardware measure_hardware(const cpu::KernelTable& kernels, DType dtype, int ranks, int threads) {
  ThreadTeam team(ranks * threads);
  std::size_t panel = std::size_t{cpu::kPanelRows} * kColumns * dtype_size(dtype);
  auto panels = static_cast<int>(kStreamBytes / panel);
  Buffer weights(static_cast<std::size_t>(panels) * panel);
  std::vector<Buffer> inputs;
  std::vector<Buffer> tiles;
  for (int i = 0; i < team.size(); ++i) {
    inputs.emplace_back(std::size_t{kTokens} * kColumns * sizeof(float));
    tiles.emplace_back(std::size_t{kTokens} * cpu::kPanelRows * sizeof(float));
  }
  const std::vector<float> scales(cpu::kPanelRows, 1.0f);
  auto multiply = [&](const TeamMember& member, int index, int tokens) {
    auto id = static_cast<std::size_t>(member.id());
    const std::byte* at = weights.as<std::byte>() + static_cast<std::size_t>(index) * panel;
    auto* tile = tiles[id].as<float>();
    if (dtype == DType::kFloat32) {
      kernels.panel_gemm_f32(inputs[id].as<float>(), kColumns, tokens,
                             reinterpret_cast<const float*>(at), cpu::kPanelRows, kColumns, nullptr,
                             tile);
    } else if (dtype == DType::kInt8) {
      kernels.panel_gemm_int8(inputs[id].as<bf16>(), kColumns, tokens,
                              reinterpret_cast<const std::int8_t*>(at), scales.data(), kColumns,
                              nullptr, tile);
    } else {
      kernels.panel_gemm_bf16(inputs[id].as<bf16>(), kColumns, tokens,
                              reinterpret_cast<const bf16*>(at), cpu::kPanelRows, kColumns, nullptr,
                              tile);
    }
  };
  auto stream = [&](TeamMember& member) {
    auto [begin, end] = member.share(panels);
    for (int i = begin; i < end; ++i) multiply(member, i, 1);
  };
  timed(team, [&](TeamMember& member) {  // takes the pages, where they are read later
    auto [begin, end] = member.share(panels);
    std::memset(weights.as<std::byte>() + static_cast<std::size_t>(begin) * panel, 0,
                static_cast<std::size_t>(end - begin) * panel);
  });
  double stream_seconds = std::min(timed(team, stream), timed(team, stream));
  auto compute = [&](TeamMember& member) {
    auto first = member.share(panels).first;
    for (int i = 0; i < kProducts; ++i) multiply(member, first, kTokens);
  };
  double compute_seconds = std::min(timed(team, compute), timed(team, compute));
  ThreadTeam rank(threads);
  double barrier_seconds = timed(rank, [](TeamMember& member) {
    for (int i = 0; i < kBarriers; ++i) member.barrier();
  });

  Hardware hardware;
  hardware.name = "this machine, 1 of " + std::to_string(ranks) + " ranks";
  hardware.memory_bytes_per_s = static_cast<double>(kStreamBytes) / stream_seconds / ranks;
  hardware.flops_per_s = 2.0 * kTokens * cpu::kPanelRows * kColumns * kProducts *
                         static_cast<double>(threads) / compute_seconds;
  // Of the same cores: attention reads K and V in short runs, and multiplies in fp32.
  hardware.attention_bytes_per_s = 0.7 * hardware.memory_bytes_per_s;
  hardware.attention_flops_per_s = 0.25 * hardware.flops_per_s;
  hardware.operation_s = barrier_seconds / kBarriers;
  return hardware;
}

LinkModel measure_local_link(int ranks) {
  LocalGroup group(ranks, kLargeExchange);
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int rank = 0; rank < ranks; ++rank) communicators.push_back(group.communicator(rank));
  ThreadTeam team(ranks);
  auto exchange = [&](std::size_t bytes) {
    return [&, bytes](TeamMember& member) {
      Communicator& own = *communicators[static_cast<std::size_t>(member.id())];
      std::vector<float> data(bytes / sizeof(float), 1.0f);
      for (int i = 0; i < kExchanges; ++i) own.all_reduce(data.data(), data.size());
    };
  };
  timed(team, exchange(kLargeExchange));
  double small = timed(team, exchange(64)) / kExchanges;
  double large = timed(team, exchange(kLargeExchange)) / kExchanges;
  LinkModel link;
  link.latency_s = small;
  link.bytes_per_s =
      (ranks - 1) * static_cast<double>(kLargeExchange) / std::max(large - small, 1e-9);
  return link;
}

}  // namespace deinfer

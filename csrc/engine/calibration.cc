#include "engine/calibration.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/buffer.h"
#include "base/thread_team.h"
#include "comm/local.h"
#include "kernels/cpu/compressed_panel.h"
#include "ops/panel_jobs.h"
#include "plan/overlap.h"

namespace deinfer {
namespace {

constexpr int kColumns = 2048;
constexpr int kTokens = 128;
constexpr std::size_t kStreamBytes = std::size_t{96} << 20;  // beyond the caches
constexpr int kProducts = 24;                                // of kTokens tokens, per thread
constexpr int kHeadDim = 128;
constexpr int kKvBlock = 16;          // tokens
constexpr int kHeadGroup = 4;         // heads that share K and V
constexpr int kQueries = 16;          // tokens of a prompt that attend together
constexpr int kAttentionSplits = 32;  // computed by each thread over the same K and V
constexpr int kRebuiltRank = 512;     // of latents
constexpr int kRebuilds = 512;        // of a block, per thread
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

/// Attention over the KV cache of one head that lies in `memory`, in splits of cpu::kKvSplit
/// positions.
class AttentionProbe {
 public:
  AttentionProbe(const cpu::KernelTable& kernels, DType dtype, const Buffer& memory,
                 std::size_t bytes, int threads)
      : kernels_(kernels), f32_(dtype == DType::kFloat32) {
    const std::size_t position = kHeadDim * (f32_ ? sizeof(float) : sizeof(bf16));
    splits_ = static_cast<int>(bytes / (2 * position * cpu::kKvSplit));
    split_bytes_ = 2 * position * cpu::kKvSplit;
    table_.resize(static_cast<std::size_t>(splits_ * cpu::kKvSplit / kKvBlock));
    std::iota(table_.begin(), table_.end(), 0);
    cpu::KvSideView side;
    side.block_stride = kKvBlock * kHeadDim;
    side.block_table = table_.data();
    side.block_size = kKvBlock;
    side.dim = kHeadDim;
    side.group = kHeadGroup;
    kv_ = {side, side};
    kv_.k.data = memory.as<std::byte>();
    kv_.v.data = memory.as<std::byte>() + split_bytes_ / 2 * static_cast<std::size_t>(splits_);
    const int rows = kQueries * kHeadGroup;
    const std::size_t floats = static_cast<std::size_t>(rows) * (kHeadDim + 2);
    for (int i = 0; i < threads; ++i) {
      scratch_.emplace_back(kernels.attention_scratch(rows, kHeadDim) * sizeof(float));
      states_.emplace_back(floats * sizeof(float));
    }
    query_ = Buffer(static_cast<std::size_t>(rows) * kHeadDim * sizeof(float));
  }

  int splits() const { return splits_; }
  double split_bytes() const { return static_cast<double>(split_bytes_); }
  /// Of `tokens` tokens that see a whole split.
  static double split_flops(int tokens) {
    return 4.0 * tokens * kHeadGroup * cpu::kKvSplit * kHeadDim;
  }

  void run(const TeamMember& member, int split, int tokens) {
    auto id = static_cast<std::size_t>(member.id());
    const int rows = tokens * kHeadGroup;
    cpu::QueryView query;
    query.q = query_.as<float>();
    query.token_stride = kHeadGroup * kHeadDim;
    query.tokens = tokens;
    query.heads = kHeadGroup;
    query.first_position = splits_ * cpu::kKvSplit - tokens;
    auto* numbers = states_[id].as<float>();
    cpu::AttentionState state{numbers, numbers + rows, numbers + 2 * rows};
    auto* attend = f32_ ? kernels_.attention_split_f32 : kernels_.attention_split_bf16;
    attend(query, kv_, split, scratch_[id].as<float>(), state);
  }

 private:
  const cpu::KernelTable& kernels_;
  bool f32_;
  int splits_ = 0;
  std::size_t split_bytes_ = 0;
  std::vector<std::int32_t> table_;
  cpu::KvView kv_;
  std::vector<Buffer> scratch_, states_;  // of each thread
  Buffer query_;
};

}  // namespace

Hardware measure_hardware(const cpu::KernelTable& kernels, cpu::WeightFormat format, int ranks,
                          int threads) {
  ThreadTeam team(ranks * threads);
  const DType dtype = format.dtype;
  const std::size_t plain = std::size_t{cpu::kPanelRows} * kColumns * dtype_size(dtype);
  const std::size_t panel = format.compressed ? cpu::compressed_panel_bytes(kColumns) : plain;
  const auto panels = static_cast<int>(kStreamBytes / panel);
  cpu::PackedMatrix weights = cpu::allocate_packed(dtype, panels * cpu::kPanelRows, kColumns,
                                                   cpu::kPanelRows, nullptr, format.compressed);
  const Buffer zeros(plain);
  Buffer one(panel);
  if (format.compressed) {
    cpu::compress_panel(zeros.as<bf16>(), kColumns, one.as<std::byte>());
  }
  std::vector<ActivationBuffer> inputs;
  std::vector<ThreadScratch> scratch(static_cast<std::size_t>(team.size()));
  for (int i = 0; i < team.size(); ++i) {
    inputs.emplace_back(dtype == DType::kFloat32 ? dtype : DType::kBFloat16, kTokens, kColumns);
  }
  auto multiply = [&](const TeamMember& member, int index, int tokens, int columns = kColumns) {
    auto id = static_cast<std::size_t>(member.id());
    multiply_panel(kernels, weights, {0, columns}, inputs[id].view(), tokens, index, nullptr,
                   scratch[id].expanded, scratch[id].tile_a.as<float>());
  };
  auto stream = [&](TeamMember& member) {
    auto [begin, end] = member.share(panels);
    for (int i = begin; i < end; ++i) multiply(member, i, 1);
  };
  timed(team, [&](TeamMember& member) {  // takes the pages, where they are read later
    auto [begin, end] = member.share(panels);
    for (int i = begin; i < end; ++i) {
      std::memcpy(const_cast<void*>(weights.panel(i)), one.as<std::byte>(), panel);
    }
  });
  double stream_seconds = std::min(timed(team, stream), timed(team, stream));
  auto compute = [&](TeamMember& member) {
    auto first = member.share(panels).first;
    for (int i = 0; i < kProducts; ++i) multiply(member, first, kTokens);
  };
  double compute_seconds = std::min(timed(team, compute), timed(team, compute));
  auto rebuild = [&](TeamMember& member) {
    auto write = dtype == DType::kFloat32 ? kernels.write_k_f32 : kernels.write_k_bf16;
    ThreadScratch& own = scratch[static_cast<std::size_t>(member.id())];
    auto* tile = own.tile_a.as<float>();
    float* keys = tile + kKvBlock * cpu::kPanelRows;
    const int first = member.share(panels).first;
    for (int i = 0; i < kRebuilds; ++i) {
      own.expanded.forget();  // every block has latents of its own
      multiply(member, first, kKvBlock, kRebuiltRank);
      for (int row = 0; row < kKvBlock; ++row) {
        write(tile + row * cpu::kPanelRows, cpu::kPanelRows, 0, cpu::kPanelRows, row, keys);
      }
    }
  };
  const double rebuild_seconds = std::min(timed(team, rebuild), timed(team, rebuild));
  ThreadTeam rank(threads);
  double barrier_seconds = timed(rank, [](TeamMember& member) {
    for (int i = 0; i < kBarriers; ++i) member.barrier();
  });

  Hardware hardware;
  hardware.name = "this machine, 1 of " + std::to_string(ranks) + " ranks";
  hardware.memory_bytes_per_s = panels * static_cast<double>(plain) / stream_seconds / ranks;
  hardware.flops_per_s = 2.0 * kTokens * cpu::kPanelRows * kColumns * kProducts *
                         static_cast<double>(threads) / compute_seconds;
  hardware.rebuild_flops_per_s = 2.0 * kKvBlock * cpu::kPanelRows * kRebuiltRank * kRebuilds *
                                 static_cast<double>(threads) / rebuild_seconds;
  AttentionProbe probe(kernels, dtype, weights.data, weights.data.size(), team.size());
  auto decode = [&](TeamMember& member) {
    auto [begin, end] = member.share(probe.splits());
    for (int split = begin; split < end; ++split) probe.run(member, split, 1);
  };
  const double decode_seconds = std::min(timed(team, decode), timed(team, decode));
  auto prefill = [&](TeamMember& member) {
    const int split = member.share(probe.splits() - 1).first;
    for (int i = 0; i < kAttentionSplits; ++i) probe.run(member, split, kQueries);
  };
  const double prefill_seconds = std::min(timed(team, prefill), timed(team, prefill));
  hardware.attention_bytes_per_s = probe.splits() * probe.split_bytes() / decode_seconds / ranks;
  hardware.attention_flops_per_s =
      kAttentionSplits * AttentionProbe::split_flops(kQueries) * threads / prefill_seconds;
  hardware.operation_s = barrier_seconds / kBarriers;
  hardware.tile_tokens = kTileTokens;
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

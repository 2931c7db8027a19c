#include "engine/rank_group.h"

#include <algorithm>
#include <limits>
#include <map>

#include "base/core_binding.h"
#include "comm/device_communicator.h"
#include "comm/emulated_link.h"
#include "comm/local.h"
#include "engine/cuda_worker.h"
#include "engine/device.h"

namespace deinfer {
namespace {

/// Of what ranks on devices tell each other by way of the host, while loading.
constexpr std::size_t kHostExchangeBytes = 64 << 10;

}  // namespace

RankGroup::RankGroup(const EngineConfig& config, const ModelConfig& model, const PlanChoice& choice,
                     int threads, int max_model_len, const LoadProgress& progress,
                     const CommunicatorWrapper& wrap)
    : plans_(choice.plans),
      ranks_(plans_[0]->size()),
      workers_(static_cast<std::size_t>(plans_[0]->size())) {
  int size = ranks_.size();
  RankShare first(plans_, 0);
  const std::vector<int> devices = choose_devices(config.device, size);
  std::vector<DeviceCommunicator*> peers(static_cast<std::size_t>(size));
  if (devices.empty()) {
    make_communicators(
        config,
        Decoder::exchange_bytes(model, first, choice.kv_forms, config.max_num_batched_tokens),
        wrap);
  } else {
    make_communicators(config, kHostExchangeBytes, wrap);
    if (size > 1) {
      const auto group = make_device_group(devices, ExchangeOptions::from_environment());
      for (std::size_t rank = 0; rank < peers.size(); ++rank) {
        std::unique_ptr<DeviceCommunicator> communicator =
            group->communicator(std::move(communicators_[rank]));
        peers[rank] = communicator.get();
        communicators_[rank] = std::move(communicator);
      }
    }
  }
  on_all([&](int rank) {
    auto index = static_cast<std::size_t>(rank);
    const LoadProgress& reports = rank == 0 ? progress : LoadProgress{};
    if (!devices.empty()) {
      workers_[index] = std::make_unique<CudaWorker>(
          config, model, RankShare(plans_, rank), choice.kv_forms, devices[index],
          std::move(communicators_[index]), peers[index], threads, max_model_len, reports);
      return;
    }
    // Threads inherit the cores of the one that creates them, and memory comes from where it is
    // first touched.
    CoreBinding binding(rank, size, threads);
    workers_[index] = std::make_unique<CpuWorker>(
        config, model, RankShare(plans_, rank), choice.chunks, choice.kv_forms,
        std::move(communicators_[index]), threads, max_model_len, reports);
  });
  on_all([&](int index) { rank(index).join(); });
}

/// At the same time: what a device still computes may wait for the other ranks.
RankGroup::~RankGroup() {
  ranks_.run([&](TeamMember& member) { workers_[static_cast<std::size_t>(member.id())].reset(); });
}

void RankGroup::make_communicators(const EngineConfig& config, std::size_t bytes,
                                   const CommunicatorWrapper& wrap) {
  const int size = ranks_.size();
  if (size == 1) {
    communicators_.push_back(make_single_communicator(bytes));
    return;
  }
  if (!config.emulated_link.empty()) bytes += kEmulatedLinkHeaderBytes;
  LinkModel link;
  if (!config.emulated_link.empty()) link = parse_link_model(config.emulated_link);
  LocalGroup group(size, bytes);
  for (int rank = 0; rank < size; ++rank) {
    std::unique_ptr<Communicator> communicator = group.communicator(rank);
    if (!config.emulated_link.empty()) {
      communicator = make_emulated_link(std::move(communicator), link);
    }
    if (wrap) communicator = wrap(std::move(communicator));
    communicators_.push_back(std::move(communicator));
  }
}

void RankGroup::on_all(const std::function<void(int rank)>& fn) try {
  // The ranks are out of step: all would find the communicator aborted, and none report.
  if (failure_) std::rethrow_exception(failure_);
  ranks_.run([&](TeamMember& member) {
    auto index = static_cast<std::size_t>(member.id());
    try {
      fn(member.id());
    } catch (const CommunicatorAborted&) {
      throw TeamAborted{};  // another rank has failed and reports
    } catch (...) {
      Communicator* communicator =
          workers_[index] ? &workers_[index]->communicator() : communicators_[index].get();
      if (communicator != nullptr) communicator->abort();
      throw;
    }
  });
} catch (...) {
  if (!failure_) failure_ = std::current_exception();
  throw;
}

void RankGroup::allocate_kv_cache(std::int64_t num_blocks) {
  on_all([&](int index) { rank(index).allocate_kv_cache(num_blocks); });
}

void RankGroup::start(const Batch& batch) {
  batch_ = &batch;
  if (is_asynchronous()) on_all([&](int index) { rank(index).start(batch); });
}

std::span<const TokenId> RankGroup::finish(const Worker::LogitsConsumer& consume) {
  std::span<const TokenId> most_likely;
  on_all([&](int index) {
    if (!is_asynchronous()) rank(index).start(*batch_);
    std::span<const TokenId> own = rank(index).finish(consume);
    if (index == 0) most_likely = own;
  });
  return most_likely;
}

std::int64_t RankGroup::kv_blocks_that_fit() const {
  std::map<int, std::uint64_t> block_bytes;  // by place
  for (const auto& worker : workers_) {
    block_bytes[worker->memory_place()] += worker->kv_block_bytes();
  }
  std::uint64_t blocks = std::numeric_limits<std::int64_t>::max();
  for (const auto& worker : workers_) {
    blocks = std::min(blocks, worker->kv_memory() / block_bytes[worker->memory_place()]);
  }
  return static_cast<std::int64_t>(blocks);
}

std::uint64_t RankGroup::kv_block_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& worker : workers_) bytes += worker->kv_block_bytes();
  return bytes;
}

}  // namespace deinfer

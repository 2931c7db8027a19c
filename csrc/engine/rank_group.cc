#include "engine/rank_group.h"

#include "base/core_binding.h"
#include "comm/emulated_link.h"
#include "comm/local.h"
#include "engine/cuda_worker.h"
#include "engine/device.h"

namespace deinfer {

RankGroup::RankGroup(const EngineConfig& config, const ModelConfig& model, const PlanChoice& choice,
                     int threads, int max_model_len, const LoadProgress& progress,
                     const CommunicatorWrapper& wrap)
    : plans_(choice.plans),
      ranks_(plans_[0]->size()),
      workers_(static_cast<std::size_t>(plans_[0]->size())) {
  int size = ranks_.size();
  RankShare first(plans_, 0);
  std::size_t bytes =
      Decoder::exchange_bytes(model, first, choice.kv_forms, config.max_num_batched_tokens);
  if (size == 1) {
    communicators_.push_back(make_single_communicator(bytes));
  } else {
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
  const DeviceChoice device = choose_device(config.device);
  on_all([&](int rank) {
    auto index = static_cast<std::size_t>(rank);
    const LoadProgress& reports = rank == 0 ? progress : LoadProgress{};
    if (device.is_cuda) {
      workers_[index] = std::make_unique<CudaWorker>(config, model, RankShare(plans_, rank),
                                                     device.index, std::move(communicators_[index]),
                                                     threads, max_model_len, reports);
      return;
    }
    // Threads inherit the cores of the one that creates them, and memory comes from where it is
    // first touched.
    CoreBinding binding(rank, size, threads);
    workers_[index] = std::make_unique<CpuWorker>(
        config, model, RankShare(plans_, rank), choice.chunks, choice.kv_forms,
        std::move(communicators_[index]), threads, max_model_len, reports);
  });
  on_all([&](int index) { rank(index).share_norm_terms(); });
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

std::span<const TokenId> RankGroup::execute(const Batch& batch,
                                            const Worker::LogitsConsumer& consume) {
  std::span<const TokenId> most_likely;
  on_all([&](int index) {
    std::span<const TokenId> own = rank(index).execute(batch, consume);
    if (index == 0) most_likely = own;
  });
  return most_likely;
}

std::uint64_t RankGroup::kv_block_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& worker : workers_) bytes += worker->kv_block_bytes();
  return bytes;
}

}  // namespace deinfer

// The tensor-parallel ranks of one engine: threads of this process, each with its team.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "base/thread_team.h"
#include "engine/plan_choice.h"
#include "engine/worker.h"

namespace deinfer {

/// Puts something around a rank's end of the group: tests do, to watch it and to let it fail.
using CommunicatorWrapper =
    std::function<std::unique_ptr<Communicator>(std::unique_ptr<Communicator>)>;

class RankGroup {
 public:
  /// Loads every rank's weights, at the same time. `threads` is the size of each rank's team; cores
  /// are divided among the ranks when there are enough. Throws what a rank throws.
  RankGroup(const EngineConfig& config, const ModelConfig& model, const PlanChoice& choice,
            int threads, int max_model_len, const LoadProgress& progress,
            const CommunicatorWrapper& wrap = {});
  ~RankGroup();

  void allocate_kv_cache(std::int64_t num_blocks);

  /// One batch on all ranks, as Worker says; `consume` is called on rank 0's team. When a rank
  /// fails, the others are released and its exception is thrown, now and by every later call.
  void start(const Batch& batch);
  std::span<const TokenId> finish(const Worker::LogitsConsumer& consume);
  bool is_asynchronous() const { return workers_[0]->is_asynchronous(); }

  int size() const { return static_cast<int>(workers_.size()); }
  const StepPlans& plans() const { return plans_; }
  Worker& rank(int index) { return *workers_[static_cast<std::size_t>(index)]; }
  /// Of all ranks together.
  std::uint64_t kv_block_bytes() const;
  /// Blocks for which every rank has memory to spare.
  std::int64_t kv_blocks_that_fit() const;

 private:
  void make_communicators(const EngineConfig& config, std::size_t bytes,
                          const CommunicatorWrapper& wrap);
  void on_all(const std::function<void(int rank)>& fn);

  StepPlans plans_;
  std::vector<std::unique_ptr<Communicator>> communicators_;  // until the workers take them
  ThreadTeam ranks_;
  std::vector<std::unique_ptr<Worker>> workers_;
  const Batch* batch_ = nullptr;
  std::exception_ptr failure_;  // the first
};

}  // namespace deinfer

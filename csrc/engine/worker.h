// One tensor-parallel rank: its weights, its KV cache, its team of threads.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/thread_team.h"
#include "comm/communicator.h"
#include "deinfer/engine.h"
#include "engine/sampler.h"
#include "model/decoder.h"

namespace deinfer {

/// Of the weights that a rank holds.
struct WeightsInfo {
  cpu::WeightFormat format;
  std::uint64_t parameters = 0;  // of the whole checkpoint
  std::uint64_t bytes = 0;
  int lowrank_matrices = 0;
  int dense_matrices = 0;
};

/// Adds the linears of layers to the counts.
template <typename Layers>
void count_matrices(const Layers& layers, WeightsInfo& info) {
  for (const auto& layer : layers) {
    for (const auto* linear : layer.linears()) {
      ++(linear->is_low_rank() ? info.lowrank_matrices : info.dense_matrices);
    }
  }
}

/// Of a rank's KV cache.
struct KvInfo {
  std::uint64_t pool_bytes = 0;
  std::uint64_t block_bytes = 0;
  std::uint64_t dense_bytes_per_token = 0;  // if no layer kept latents
  std::vector<KvLayerInfo> layers;
};

/// The part of the free memory that the KV pool takes on a CPU unless told otherwise.
constexpr std::uint64_t kv_share(std::uint64_t memory) { return memory / 4; }

/// What a worker samples by itself in one step, as far as there is room.
struct SamplingRoom {
  int most_reported = -1;  // tokens that a report may list; -1: no row is sampled
  int history = 0;         // tokens that are punished or banned, of all rows
  int reported = 0;        // tokens that reports list, of all rows

  /// Takes a row in; false where there is no room for it.
  bool take(const SampledRow& row);
};

/// What runs a rank's part of every batch.
class Worker {
 public:
  virtual ~Worker() = default;

  /// Completes the rank by what it needs of the others: terms of norms, and on devices the memory
  /// of exchanges. All ranks must call it once all are there, so that none waits for one that has
  /// failed to load.
  virtual void join() = 0;

  /// Sizes the KV cache; call it once before start().
  virtual void allocate_kv_cache(std::int64_t num_blocks) = 0;

  /// Receives logits[count, vocab] of the batch's logit rows first .. first + count. Called on
  /// every thread of rank 0's team; may overwrite the logits of its own share of the rows.
  using LogitsConsumer =
      std::function<void(TeamMember& member, int first, int count, float* logits)>;

  /// Whether a device computes what start() begins, so that this host is free until finish().
  virtual bool is_asynchronous() const { return false; }
  /// Begins one batch, which all ranks must do, and which must stay as it is until finish().
  virtual void start(const Batch& batch) = 0;
  /// Completes it and returns the most likely tokens of its argmax_rows (on rank 0), valid until
  /// the next start(). Errors of any thread surface in either; CommunicatorAborted when another
  /// rank has failed.
  virtual std::span<const TokenId> finish(const LogitsConsumer& consume) = 0;

  /// Numbers of tokens to which it fills up decode steps, ascending; empty: it does not.
  virtual std::vector<int> step_sizes() const { return {}; }

  /// What it can sample by itself of a step. Other rows are logit_rows, for the consumer.
  virtual SamplingRoom sampling_room() const { return {}; }
  /// Of the last batch's sampled rows, on rank 0; may be moved from.
  virtual std::span<SampleResult> sampled() { return {}; }

  /// Of the last batch, on rank 0; see Decoder.
  virtual std::span<const float> hidden_states() const = 0;

  virtual std::uint64_t kv_block_bytes() const = 0;
  /// Of what is free where this rank is, so much may be taken for the KV caches of all ranks there.
  virtual std::uint64_t kv_memory() const = 0;
  /// Ranks with the same number share that memory.
  virtual int memory_place() const = 0;
  /// Of the cache that is allocated.
  virtual KvInfo kv_info() const = 0;
  virtual WeightsInfo weights_info() const = 0;
  /// Of the host, for sampling.
  virtual const cpu::KernelTable& kernels() const = 0;
  virtual int num_threads() const = 0;
  virtual Communicator& communicator() = 0;
};

/// A rank on CPU cores.
class CpuWorker final : public Worker {
 public:
  /// Loads this rank's weights. `threads` is the size of its team; kv_forms as load_decoder().
  CpuWorker(const EngineConfig& config, const ModelConfig& model, const RankShare& share,
            const StepChunks& chunks, const std::vector<KvForms>& kv_forms,
            std::unique_ptr<Communicator> communicator, int threads, int max_model_len,
            const LoadProgress& progress);

  void join() override;
  void allocate_kv_cache(std::int64_t num_blocks) override;
  void start(const Batch& batch) override { batch_ = &batch; }
  std::span<const TokenId> finish(const LogitsConsumer& consume) override;
  std::span<const float> hidden_states() const override { return decoder_->hidden_states(); }
  std::uint64_t kv_block_bytes() const override;
  std::uint64_t kv_memory() const override;
  int memory_place() const override { return 0; }
  KvInfo kv_info() const override;
  WeightsInfo weights_info() const override;
  const cpu::KernelTable& kernels() const override { return kernels_; }
  int num_threads() const override { return team_.size(); }
  Communicator& communicator() override { return *communicator_; }
  const Decoder& decoder() const { return *decoder_; }

 private:
  StepChunks chunks_;
  const cpu::KernelTable& kernels_;
  std::unique_ptr<Communicator> communicator_;
  TeamExchange exchange_;
  std::array<ResidualLayout, kNumStepKinds> residual_;
  ThreadTeam team_;
  std::uint64_t parameters_ = 0;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::vector<ThreadScratch> scratch_;
  const Batch* batch_ = nullptr;
  std::vector<TokenId> most_likely_;
  Buffer partial_sums_;  // ExecutionContext::partial_sums
  Buffer logits_;        // [Decoder::kLogitRows, vocab] on rank 0
};

}  // namespace deinfer

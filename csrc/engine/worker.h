// One tensor-parallel rank: its weights, its KV cache, its team of threads.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/thread_team.h"
#include "comm/communicator.h"
#include "deinfer/engine.h"
#include "model/decoder.h"

namespace deinfer {

class Worker {
 public:
  /// Loads this rank's weights. `threads` is the size of its team; kv_forms as load_decoder().
  Worker(const EngineConfig& config, const ModelConfig& model, const RankShare& share,
         const StepChunks& chunks, const std::vector<KvForms>& kv_forms,
         std::unique_ptr<Communicator> communicator, int threads, int max_model_len,
         const LoadProgress& progress);

  /// Completes the weights by what the other ranks know of theirs. All ranks must call it once all
  /// are there, so that none waits for one that has failed to load.
  void share_norm_terms();

  /// Sizes the KV cache; call it once before execute().
  void allocate_kv_cache(std::int64_t num_blocks);

  /// Receives logits[count, vocab] of the batch's logit rows first .. first + count. Called on
  /// every thread of rank 0's team; may overwrite the logits of its own share of the rows.
  using LogitsConsumer =
      std::function<void(TeamMember& member, int first, int count, float* logits)>;

  /// Runs one batch, which all ranks must do, and returns the most likely tokens of its argmax_rows
  /// (on rank 0), valid until the next call. Errors of any thread surface here;
  /// CommunicatorAborted when another rank has failed.
  std::span<const TokenId> execute(const Batch& batch, const LogitsConsumer& consume);

  /// Of the last batch, on rank 0; see Decoder.
  std::span<const float> hidden_states() const { return decoder_->hidden_states(); }

  std::uint64_t kv_block_bytes() const;
  /// Of the pools that are allocated.
  std::uint64_t kv_pool_bytes() const;
  KvCache& kv_cache() { return *cache_; }
  std::uint64_t parameters() const { return parameters_; }
  const Decoder& decoder() const { return *decoder_; }
  const cpu::KernelTable& kernels() const { return kernels_; }
  int num_threads() const { return team_.size(); }
  Communicator& communicator() { return *communicator_; }

 private:
  int block_size_;
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
  std::vector<TokenId> most_likely_;
  Buffer partial_sums_;  // ExecutionContext::partial_sums
  Buffer logits_;        // [Decoder::kLogitRows, vocab] on rank 0
};

}  // namespace deinfer

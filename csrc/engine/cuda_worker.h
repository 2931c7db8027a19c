// A rank on a CUDA device.
#pragma once

#include <memory>
#include <span>

#include "engine/worker.h"
#include "kernels/cuda/runtime.h"
#include "model/cuda_decoder.h"

namespace deinfer {

/// The part of a device's free memory that the KV pool takes unless told otherwise: graphs and the
/// driver take some more later.
constexpr std::uint64_t cuda_kv_share(std::uint64_t memory) { return memory / 10 * 9; }

/// Computes in bf16 (weights: or int8) and samples, with the tokens and reports that the host's
/// sampler finds from the same logits. Left to the host, by `threads` threads and from logits that
/// are copied there: rows whose logits are asked for, reports of more than cuda::kMaxReported
/// tokens (as much to copy as the logits), penalties on more tokens than
/// CudaSampling::kHistoryTokens, larger vocabularies than cuda::kMaxSampledVocabulary.
class CudaWorker final : public Worker {
 public:
  /// Loads this rank's weights onto device `device`. `peers`: what `communicator` is, of several
  /// ranks; else null. kv_forms as load_cuda_weights(). Throws kUnsupported for what the CUDA
  /// engine does not do: float32, emulated links, exchanges in chunks.
  CudaWorker(const EngineConfig& config, const ModelConfig& model, const RankShare& share,
             const std::vector<KvForms>& kv_forms, int device,
             std::unique_ptr<Communicator> communicator, DeviceCommunicator* peers, int threads,
             int max_model_len, const LoadProgress& progress);
  ~CudaWorker() override;

  void join() override;
  void allocate_kv_cache(std::int64_t num_blocks) override;
  bool is_asynchronous() const override { return true; }
  void start(const Batch& batch) override;
  std::span<const TokenId> finish(const LogitsConsumer& consume) override;
  std::vector<int> step_sizes() const override { return graph_sizes(max_sequences_); }
  SamplingRoom sampling_room() const override;
  std::span<SampleResult> sampled() override { return sampled_; }
  std::span<const float> hidden_states() const override { return decoder_->hidden_states(); }
  std::uint64_t kv_block_bytes() const override { return decoder_->kv_block_bytes(); }
  std::uint64_t kv_memory() const override;
  int memory_place() const override { return device_; }
  KvInfo kv_info() const override;
  WeightsInfo weights_info() const override;
  const cpu::KernelTable& kernels() const override { return kernels_; }
  int num_threads() const override { return team_.size(); }
  Communicator& communicator() override { return *communicator_; }
  const CudaDecoder& decoder() const { return *decoder_; }

 private:
  /// What the device has sampled, as the host's sampler would say it.
  void take_sampled();

  int device_;
  int block_size_;
  int max_sequences_;
  std::int64_t num_kv_blocks_ = 0;
  const cpu::KernelTable& kernels_;
  std::unique_ptr<Communicator> communicator_;
  DeviceCommunicator* peers_;
  ThreadTeam team_;
  std::uint64_t parameters_ = 0;
  std::unique_ptr<cuda::DeviceStream> stream_;
  std::unique_ptr<CudaDecoder> decoder_;
  const Batch* batch_ = nullptr;
  std::vector<SampleResult> sampled_;
};

}  // namespace deinfer

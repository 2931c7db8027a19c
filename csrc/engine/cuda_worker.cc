#include "engine/cuda_worker.h"

#include <algorithm>

#include "base/check.h"
#include "engine/plan_choice.h"
#include "kernels/cuda/devices.h"

namespace deinfer {

static_assert(cuda::kSortedWindow == Candidates::kSortedWindow &&
                  cuda::kPivotSample == Candidates::kPivotSample,
              "windows are those of the host");

CudaWorker::CudaWorker(const EngineConfig& config, const ModelConfig& model, const RankShare& share,
                       const std::vector<KvForms>& kv_forms, int device,
                       std::unique_ptr<Communicator> communicator, DeviceCommunicator* peers,
                       int threads, int max_model_len, const LoadProgress& progress)
    : device_(device),
      block_size_(config.block_size),
      max_sequences_(std::min(config.max_num_seqs, config.max_num_batched_tokens)),
      kernels_(cpu::kernels_for(select_isa())),
      communicator_(std::move(communicator)),
      peers_(peers),
      team_(threads) {
  if (config.dtype == "float32") {
    fail(ErrorCode::kUnsupported, "dtype=\"", config.dtype,
         "\": on CUDA devices weights are bfloat16 or int8");
  }
  if (!config.emulated_link.empty()) {
    fail(ErrorCode::kUnsupported, "emulated_link=\"", config.emulated_link,
         "\": on CUDA devices exchanges take the time that they take");
  }
  if (config.exchange_chunks > 1) {
    fail(ErrorCode::kUnsupported, "exchange_chunks=", config.exchange_chunks,
         ": on CUDA devices exchanges go whole");
  }
  if (config.weight_compression == "lossless") {
    fail(ErrorCode::kUnsupported,
         "weight_compression=\"lossless\": there are no kernels for it on CUDA devices");
  }
  cuda::use_device(device_);
  stream_ = std::make_unique<cuda::DeviceStream>();
  WeightLoader loader(config.model, model, share, team_, progress);
  CudaWeights weights =
      load_cuda_weights(model, weight_type(config, model), kv_forms, loader, team_, *stream_);
  parameters_ = loader.parameters();
  const BatchLimits limits{config.max_num_batched_tokens, max_model_len, config.hidden_state_layers,
                           max_sequences_};
  decoder_ = std::make_unique<CudaDecoder>(
      model, share, std::move(weights), limits, max_sequences_, config.block_size,
      cuda::devices()[static_cast<std::size_t>(device_)].multiprocessors, peers_, *stream_);
}

// Kernels that still run, after a failure, read the other ranks' memory.
CudaWorker::~CudaWorker() {
  if (stream_ == nullptr) return;
  try {
    peers_ != nullptr && peers_->is_open() ? peers_->synchronize() : stream_->synchronize();
  } catch (const Error&) {  // which the failure was
  } catch (const CommunicatorAborted&) {
  }
}

void CudaWorker::join() {
  cuda::use_device(device_);
  decoder_->join();
}

void CudaWorker::allocate_kv_cache(std::int64_t num_blocks) {
  cuda::use_device(device_);
  decoder_->allocate_kv_cache(num_blocks);
  num_kv_blocks_ = num_blocks;
}

std::uint64_t CudaWorker::kv_memory() const {
  cuda::use_device(device_);
  return cuda_kv_share(cuda::free_memory());
}

KvInfo CudaWorker::kv_info() const {
  KvInfo info;
  info.block_bytes = kv_block_bytes();
  info.pool_bytes = info.block_bytes * static_cast<std::uint64_t>(num_kv_blocks_);
  const std::vector<CudaLayer>& layers = decoder_->weights().layers;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const KvBytes bytes = decoder_->kv_token_bytes(static_cast<int>(i));
    info.layers.push_back(
        {kv_form_name(layers[i].kv.k), kv_form_name(layers[i].kv.v), bytes.k, bytes.v});
    info.dense_bytes_per_token += decoder_->dense_kv_token_bytes();
  }
  return info;
}

WeightsInfo CudaWorker::weights_info() const {
  const CudaWeights& weights = decoder_->weights();
  WeightsInfo info{{weights.dtype}, parameters_, weights.bytes()};
  count_matrices(weights.layers, info);
  return info;
}

void CudaWorker::start(const Batch& batch) {
  cuda::use_device(device_);
  batch_ = &batch;
  if (peers_ != nullptr) peers_->begin_turn();
  decoder_->forward(batch);
  if (peers_ != nullptr) peers_->end_turn();
}

std::span<const TokenId> CudaWorker::finish(const LogitsConsumer& consume) {
  cuda::use_device(device_);
  if (peers_ != nullptr) peers_->begin_turn();
  const int rows = static_cast<int>(batch_->logit_rows.size());
  for (int first = 0; first < rows; first += CudaDecoder::kLogitRows) {
    const int count = std::min(CudaDecoder::kLogitRows, rows - first);
    float* logits = decoder_->logits(first, count);
    if (logits == nullptr) continue;  // rank 0 has them
    team_.run([&](TeamMember& member) { consume(member, first, count, logits); });
  }
  decoder_->finish();
  take_sampled();
  if (peers_ != nullptr) peers_->end_turn();
  return decoder_->most_likely();
}

SamplingRoom CudaWorker::sampling_room() const {
  if (!decoder_->samples()) return {};
  return {cuda::kMaxReported, CudaSampling::kHistoryTokens, CudaSampling::kReportedTokens};
}

void CudaWorker::take_sampled() {
  sampled_.resize(decoder_->sampled().empty() ? 0 : batch_->sampled.size());  // of rank 0 alone
  std::vector<Candidate> ranked;
  const cuda::ReportedToken* reported = decoder_->reported().data();
  for (std::size_t i = 0; i < sampled_.size(); ++i) {
    const cuda::SampledToken& token = decoder_->sampled()[i];
    sampled_[i] = {token.token, {}};
    const int top = batch_->sampled[i].top;
    if (top < 0) continue;
    ranked.clear();
    for (int j = 0; j < token.top; ++j) ranked.push_back({reported[j].logit, reported[j].token});
    reported += top;
    sampled_[i].logprobs = log_probabilities(
        {{token.logit, token.token}, token.rank, token.maximum, token.total, ranked});
  }
}

}  // namespace deinfer

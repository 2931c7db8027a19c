#include "engine/worker.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr int kNormedElements = 4096;
constexpr int kMaxNormedRows = 8;

DType resolve_dtype(const std::string& name, const ModelConfig& model, const WeightLoader& loader) {
  if (name == "auto") return loader.checkpoint_dtype(model.names.embedding + ".weight");
  if (name == "int8") return DType::kInt8;
  return name == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
}

}  // namespace

Worker::Worker(const EngineConfig& config, const ModelConfig& model, const TensorParallelPlan& plan,
               std::unique_ptr<Communicator> communicator, int threads, int max_model_len,
               const LoadProgress& progress)
    : block_size_(config.block_size),
      kernels_(cpu::kernels_for(select_isa())),
      communicator_(std::move(communicator)),
      team_(threads) {
  WeightLoader loader(config.model, model, plan, communicator_->rank(), communicator_->size(),
                      team_, progress);
  DecoderWeights weights = load_decoder(model, resolve_dtype(config.dtype, model, loader), loader);
  parameters_ = loader.parameters();
  BatchLimits limits{config.max_num_batched_tokens, max_model_len};
  decoder_ = std::make_unique<Decoder>(model, std::move(weights), limits, threads);
  scratch_.resize(static_cast<std::size_t>(threads));
  for (ThreadScratch& scratch : scratch_) {
    scratch.attention = Buffer(decoder_->attention_scratch(kernels_));
    // Every thread normalises so few elements faster than it waits for the others.
    scratch.normed_rows = std::clamp(kNormedElements / model.hidden_size, 1, kMaxNormedRows);
    scratch.normed =
        ActivationBuffer(decoder_->weights().activations, scratch.normed_rows, model.hidden_size);
  }
  logits_ = Buffer(std::size_t{Decoder::kLogitRows} * static_cast<std::size_t>(model.vocab_size) *
                   sizeof(float));
}

std::uint64_t Worker::kv_block_bytes() const {
  return decoder_->kv_cache_config(block_size_, 0).block_bytes();
}

void Worker::allocate_kv_cache(std::int64_t num_blocks) {
  cache_ = std::make_unique<KvCache>(decoder_->kv_cache_config(block_size_, num_blocks));
}

std::span<const TokenId> Worker::execute(const Batch& batch, const LogitsConsumer& consume) {
  decoder_->plan(batch);
  most_likely_.resize(batch.argmax_rows.size());
  auto* logits = logits_.as<float>();
  int rows = static_cast<int>(batch.logit_rows.size());
  int argmax_rows = static_cast<int>(batch.argmax_rows.size());
  team_.run([&](TeamMember& member) {
    ExecutionContext ctx{kernels_, member, scratch_[static_cast<std::size_t>(member.id())]};
    decoder_->forward(ctx, batch, *cache_);
    for (int first = 0; first < rows; first += Decoder::kLogitRows) {
      int count = std::min(Decoder::kLogitRows, rows - first);
      decoder_->logits(ctx, batch, first, count, logits);
      consume(member, first, count, logits);
      member.barrier();
    }
    for (int first = 0; first < argmax_rows; first += Decoder::kLogitRows) {
      int count = std::min(Decoder::kLogitRows, argmax_rows - first);
      decoder_->most_likely(ctx, batch, first, count, most_likely_.data() + first);
    }
  });
  return most_likely_;
}

}  // namespace deinfer

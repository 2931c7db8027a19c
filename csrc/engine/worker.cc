#include "engine/worker.h"

#include <algorithm>

#include "base/check.h"
#include "engine/plan_choice.h"

namespace deinfer {
namespace {

constexpr int kNormedElements = 4096;
constexpr int kMaxNormedRows = 8;

}  // namespace

bool SamplingRoom::take(const SampledRow& row) {
  const auto tokens = static_cast<int>(penalized_tokens(row).size() + row.banned.size());
  const int top = std::max(row.top, 0);
  if (top > most_reported || tokens > history || top > reported) return false;
  history -= tokens;
  reported -= top;
  return true;
}

CpuWorker::CpuWorker(const EngineConfig& config, const ModelConfig& model, const RankShare& share,
                     const StepChunks& chunks, const std::vector<KvForms>& kv_forms,
                     std::unique_ptr<Communicator> communicator, int threads, int max_model_len,
                     const LoadProgress& progress)
    : chunks_(chunks),
      kernels_(cpu::kernels_for(select_isa())),
      communicator_(std::move(communicator)),
      exchange_(*communicator_),
      residual_(share.residual),
      team_(threads) {
  WeightLoader loader(config.model, model, share, team_, progress);
  const DType dtype = resolve_dtype(config.dtype, loader.source(), model);
  const cpu::WeightFormat format = weight_format(config, dtype, kernels_);
  DecoderWeights weights = load_decoder(model, share, format, kv_forms, loader);
  parameters_ = loader.parameters();
  // Every sequence samples at most once in a batch.
  BatchLimits limits{config.max_num_batched_tokens, max_model_len, config.hidden_state_layers,
                     std::min(config.max_num_seqs, config.max_num_batched_tokens),
                     config.block_size};
  decoder_ = std::make_unique<Decoder>(model, share, std::move(weights), limits, threads);
  scratch_.resize(static_cast<std::size_t>(threads));
  for (ThreadScratch& scratch : scratch_) {
    scratch.attention = Buffer(decoder_->attention_scratch(kernels_));
    // Every thread normalises so few elements faster than it waits for the others.
    scratch.normed_rows = std::clamp(kNormedElements / model.hidden_size, 1, kMaxNormedRows);
    scratch.normed =
        ActivationBuffer(decoder_->weights().activations, scratch.normed_rows, model.hidden_size);
    scratch.statistics.resize(2 * static_cast<std::size_t>(scratch.normed_rows));
    scratch.row.resize(static_cast<std::size_t>(model.hidden_size));
  }
  partial_sums_ = Buffer(share.size == 1 ? 0 : decoder_->partial_sums_bytes());
  if (share.rank == 0) {
    logits_ = Buffer(std::size_t{Decoder::kLogitRows} * static_cast<std::size_t>(model.vocab_size) *
                     sizeof(float));
  }
}

void CpuWorker::join() { decoder_->share_norm_terms(team_, *communicator_); }

std::uint64_t CpuWorker::kv_block_bytes() const {
  return decoder_->kv_cache_config(0).block_bytes();
}

std::uint64_t CpuWorker::kv_memory() const { return kv_share(available_memory()); }

KvInfo CpuWorker::kv_info() const {
  const ModelConfig& model = decoder_->config();
  const KvCacheConfig& cache = cache_->config();
  KvInfo info;
  info.block_bytes = cache.block_bytes();
  info.dense_bytes_per_token =
      std::uint64_t{2} * dtype_size(cache.dtype) * static_cast<std::uint64_t>(model.num_layers) *
      static_cast<std::uint64_t>(decoder_->share().heads.kv_heads.size() * model.head_dim);
  for (int i = 0; i < model.num_layers; ++i) {
    const KvLayerShape& layer = cache.layers[static_cast<std::size_t>(i)];
    info.pool_bytes += cache_->k_bytes(i) + cache_->v_bytes(i);
    info.layers.push_back({kv_form_name(layer.k.form), kv_form_name(layer.v.form),
                           cache.token_bytes(layer.k), cache.token_bytes(layer.v), layer.ranks});
  }
  return info;
}

WeightsInfo CpuWorker::weights_info() const {
  const DecoderWeights& weights = decoder_->weights();
  WeightsInfo info{weights.format, parameters_, weights.bytes()};
  count_matrices(weights.layers, info);
  return info;
}

void CpuWorker::allocate_kv_cache(std::int64_t num_blocks) {
  cache_ = std::make_unique<KvCache>(decoder_->kv_cache_config(num_blocks));
}

std::span<const TokenId> CpuWorker::finish(const LogitsConsumer& consume) {
  const Batch& batch = *batch_;
  most_likely_.resize(batch.argmax_rows.size());
  auto* logits = logits_.as<float>();
  int rows = static_cast<int>(batch.logit_rows.size());
  int argmax_rows = static_cast<int>(batch.argmax_rows.size());
  int step = decoder_->logit_rows(communicator_->max_bytes());
  bool prefill = std::any_of(batch.sequences.begin(), batch.sequences.end(),
                             [](const BatchSequence& run) { return run.num_rows > 1; });
  StepKind kind = prefill ? StepKind::kPrefill : StepKind::kDecode;
  const int tokens = batch.num_tokens();
  const Overlap overlap =
      exchange_.size() == 1
          ? Overlap{}
          : overlap_of(tokens, chunks_[static_cast<std::size_t>(kind)].of(tokens));
  decoder_->plan(batch, overlap);
  Ticket ticket = exchange_.next_ticket();
  team_.run([&](TeamMember& member) {
    ExecutionContext ctx{kernels_,
                         member,
                         scratch_[static_cast<std::size_t>(member.id())],
                         exchange_,
                         ticket,
                         kind,
                         residual_[static_cast<std::size_t>(kind)],
                         overlap,
                         partial_sums_.as<float>()};
    decoder_->forward(ctx, batch, *cache_);
    for (int first = 0; first < rows; first += step) {
      int count = std::min(step, rows - first);
      decoder_->logits(ctx, batch, first, count, logits);
      if (communicator_->rank() == 0) consume(member, first, count, logits);
      member.barrier();
    }
    for (int first = 0; first < argmax_rows; first += step) {
      int count = std::min(step, argmax_rows - first);
      decoder_->most_likely(ctx, batch, first, count, most_likely_.data() + first);
    }
  });
  return most_likely_;
}

}  // namespace deinfer

#include "model/cuda_step.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/attention_plan.h"

namespace deinfer {
namespace {

using cuda::AttentionSequence;
using cuda::AttentionTask;
using cuda::kQueryRows;
using cuda::SampleMode;
using cuda::SampleRow;
using cuda::tiles_of;

constexpr int kTaskWords = sizeof(AttentionTask) / 4;
constexpr int kSequenceWords = sizeof(AttentionSequence) / 4;
constexpr int kSampleWords = sizeof(SampleRow) / 4;

/// How a row is sampled, but for what it reads and writes.
SampleRow sample_of(const SampledRow& row, int vocabulary) {
  const SamplingParams& params = *row.params;
  SampleRow sample;
  sample.top = row.top;
  sample.given = row.given;
  sample.mode = SampleMode::kGiven;
  if (row.given >= 0) return sample;
  sample.repetition_penalty = params.repetition_penalty;
  sample.presence_penalty = params.presence_penalty;
  sample.frequency_penalty = params.frequency_penalty;
  sample.mode = SampleMode::kLargest;
  if (params.temperature == 0.0f) return sample;
  sample.mode = SampleMode::kDraw;
  sample.uniform = row.uniform;
  sample.scale = softmax_scale(params.temperature);
  sample.top_p = params.top_p;
  if (params.top_p < 1.0f) sample.tail_log_share = tail_log_share(params.top_p, vocabulary);
  if (params.top_k > 0 && params.top_k < vocabulary) sample.top_k = params.top_k;
  if (params.min_p > 0.0f) {
    sample.has_min_p = 1;
    sample.min_p_drop = min_p_drop(params.min_p, params.temperature);
  }
  return sample;
}

}  // namespace

int graph_bucket(int m) {
  if (m > 256) return 0;
  if (m > 64) return tiles_of(m, 32) * 32;
  if (m > 4) return tiles_of(m, 8) * 8;
  return m > 2 ? 4 : m;
}

std::vector<int> graph_sizes(int most) {
  std::vector<int> sizes;
  for (int size = graph_bucket(1); size > 0; size = graph_bucket(size + 1)) {
    sizes.push_back(size);
    if (size >= most) break;
  }
  return sizes;
}

CudaStep::CudaStep(const CudaStepLimits& limits) : limits_(limits) {
  std::int64_t next = 0;
  auto take = [&](std::int64_t words) {
    const std::int64_t at = next;
    next += (words + 3) / 4 * 4;
    return at;
  };
  const int tokens = padded_tokens(limits.max_tokens);
  offsets_.tokens = take(tokens);
  offsets_.positions = take(tokens);
  offsets_.slots = take(tokens);
  offsets_.argmax_rows = take(tokens);
  offsets_.logit_rows = take(tokens);
  offsets_.state_rows = take(tokens);
  offsets_.sampled_rows = take(tokens);
  offsets_.samples = take(std::int64_t{tokens} * kSampleWords);
  offsets_.sequences = take(std::int64_t{limits.max_sequences} * kSequenceWords);
  for (const CudaAttentionKind& kind : limits.attention) {
    // A sequence's last tile may be half empty; every partial task has its own rows.
    const int group = limits.heads / kind.kv_heads;
    const std::int64_t tiles =
        std::int64_t{limits.max_tokens} * group / kQueryRows + limits.max_sequences;
    const std::int64_t tasks = tiles + limits.partial_rows / kind.kv_heads;
    AttentionOffsets at{};
    at.num_tasks = take(1);
    at.num_combines = take(1);
    at.tasks = take(tasks * kTaskWords);
    at.combines = take(tiles * kTaskWords);
    offsets_.attention.push_back(at);
  }
  offsets_.tables =
      take(std::int64_t{limits.max_sequences} * tiles_of(limits.max_model_len, limits.block_size) +
           limits.history_tokens);
  offsets_.end = next;
}

std::size_t CudaStep::build(const Batch& batch, int tokens, std::byte* block) const {
  auto* words = reinterpret_cast<std::int32_t*>(block);
  auto copy_padded = [&](std::span<const int> from, std::int64_t at) {
    std::copy(from.begin(), from.end(), words + at);
    std::fill(words + at + from.size(), words + at + tokens, 0);
  };
  copy_padded(batch.token_ids, offsets_.tokens);
  copy_padded(batch.positions, offsets_.positions);
  for (int i = 0; i < tokens; ++i) {
    const bool real = i < batch.num_tokens();
    const KvSlot slot = real ? batch.slots[static_cast<std::size_t>(i)] : KvSlot{};
    words[offsets_.slots + i] = real ? slot.block * limits_.block_size + slot.offset : -1;
  }
  copy_padded(batch.argmax_rows, offsets_.argmax_rows);
  copy_padded(batch.logit_rows, offsets_.logit_rows);
  copy_padded(batch.state_rows, offsets_.state_rows);

  std::int64_t table = offsets_.tables;
  for (std::size_t i = 0; i < batch.sequences.size(); ++i) {
    const BatchSequence& sequence = batch.sequences[i];
    const AttentionSequence out{sequence.first_row, sequence.num_rows, sequence.first_position,
                                static_cast<int>(table - offsets_.tables)};
    std::memcpy(words + offsets_.sequences + static_cast<std::int64_t>(i) * kSequenceWords, &out,
                sizeof out);
    const int blocks = tiles_of(sequence.first_position + sequence.num_rows, limits_.block_size);
    std::copy_n(sequence.block_table, blocks, words + table);
    table += blocks;
  }
  for (std::size_t kind = 0; kind < limits_.attention.size(); ++kind) {
    plan_attention(batch, limits_.attention[kind], offsets_.attention[kind], words);
  }
  const bool samples = num_sampled(batch) > 0;
  return static_cast<std::size_t>(samples ? lay_out_samples(batch, tokens, table, words) : table) *
         4;
}

int CudaStep::num_sampled(const Batch& batch) {
  return batch.sampled.empty() ? 0
                               : static_cast<int>(batch.sampled.size() + batch.argmax_rows.size());
}

std::int64_t CudaStep::lay_out_samples(const Batch& batch, int tokens, std::int64_t pool,
                                       std::int32_t* words) const {
  std::int32_t* rows = words + offsets_.sampled_rows;
  auto* samples = reinterpret_cast<std::byte*>(words + offsets_.samples);
  auto put = [&](int row, const SampleRow& sample) {
    *rows++ = row;
    std::memcpy(samples, &sample, sizeof sample);
    samples += sizeof sample;
  };
  int reported = 0;
  for (const SampledRow& row : batch.sampled) {
    SampleRow sample = sample_of(row, limits_.vocabulary);
    sample.history = static_cast<int>(pool - offsets_.tables);
    if (row.given < 0) {
      const std::span<const TokenId> history = penalized_tokens(row);
      sample.tokens = static_cast<int>(history.size());
      sample.prompt_tokens = row.params->repetition_penalty != 1.0f ? row.prompt_length : 0;
      sample.banned = static_cast<int>(row.banned.size());
      std::int32_t* end = std::copy(history.begin(), history.end(), words + pool);
      pool = std::copy(row.banned.begin(), row.banned.end(), end) - words;
    }
    sample.report = reported;
    reported += std::max(row.top, 0);
    put(row.row, sample);
  }
  SampleRow largest;
  largest.mode = SampleMode::kLargest;
  for (int row : batch.argmax_rows) put(row, largest);
  for (int i = num_sampled(batch); i < tokens; ++i) put(0, {});
  return pool;
}

void CudaStep::plan_attention(const Batch& batch, const CudaAttentionKind& kind,
                              const AttentionOffsets& at, std::int32_t* words) const {
  const int group = limits_.heads / kind.kv_heads;
  auto* tasks = reinterpret_cast<AttentionTask*>(words + at.tasks);
  auto* combines = reinterpret_cast<AttentionTask*>(words + at.combines);
  int num_tiles = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    num_tiles += cuda::query_tiles(sequence.num_rows, group);
  }
  // Tiles alone keep the device busy, or splits must. The result has the same bits.
  const bool divides = num_tiles * kind.kv_heads < limits_.parallel_warps;
  int num_tasks = 0;
  int num_combines = 0;
  int partial = 0;
  for (std::size_t i = 0; i < batch.sequences.size(); ++i) {
    const BatchSequence& sequence = batch.sequences[i];
    for (int tile = 0; tile < cuda::query_tiles(sequence.num_rows, group); ++tile) {
      const cuda::TileSplits splits =
          cuda::splits_of(sequence.num_rows, sequence.first_position, tile, group, kind.window);
      AttentionTask task{static_cast<int>(i), tile, splits.first, splits.count, -1};
      const int rows = kind.kv_heads * splits.rows;
      const std::int64_t end = partial + std::int64_t{rows} * splits.count;
      if (!divides || splits.count == 1 || end > limits_.partial_rows) {
        tasks[num_tasks++] = task;
        continue;
      }
      task.partial = partial;
      combines[num_combines++] = task;
      task.num_splits = 1;
      for (int split = 0; split < splits.count; ++split) {
        task.first_split = splits.first + split;
        task.partial = partial + split * rows;
        tasks[num_tasks++] = task;
      }
      partial = static_cast<int>(end);
    }
  }
  words[at.num_tasks] = num_tasks;
  words[at.num_combines] = num_combines;
}

}  // namespace deinfer

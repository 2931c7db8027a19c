#include "ops/attention.h"

#include <algorithm>

namespace deinfer {
namespace {

// Query tokens of a prefill chunk that share one pass over K and V.
constexpr int kUnitTokens = 16;
// Memory for partial states; when it is full the remaining units run whole.
constexpr std::size_t kPartialBytes = std::size_t{16} << 20;

std::size_t aligned_floats(std::size_t count) { return (count + 15) / 16 * 16; }

std::size_t state_floats(const AttentionShape& shape) {
  auto rows = static_cast<std::size_t>(cpu::kMaxAttentionRows);
  return 2 * rows + rows * aligned_floats(static_cast<std::size_t>(shape.head_dim));
}

}  // namespace

std::size_t attention_scratch_bytes(const cpu::KernelTable& kernels, const AttentionShape& shape) {
  // The running state, the state of the current split, and the kernel's own memory.
  return (2 * state_floats(shape) +
          aligned_floats(kernels.attention_scratch(cpu::kMaxAttentionRows, shape.head_dim))) *
         sizeof(float);
}

AttentionSchedule::AttentionSchedule(const AttentionShape& shape, int num_threads)
    : shape_(shape),
      num_threads_(num_threads),
      tokens_per_unit_(std::clamp(cpu::kMaxAttentionRows / shape.group(), 1, kUnitTokens)),
      state_floats_(state_floats(shape)),
      partial_capacity_(static_cast<int>(kPartialBytes / (state_floats_ * sizeof(float)))),
      partials_(num_threads > 1
                    ? static_cast<std::size_t>(partial_capacity_) * state_floats_ * sizeof(float)
                    : 0) {}

cpu::AttentionState AttentionSchedule::state_at(float* memory) const {
  constexpr std::size_t kRows = cpu::kMaxAttentionRows;
  return {memory, memory + kRows, memory + 2 * kRows};
}

void AttentionSchedule::plan(const Batch& batch) {
  units_.clear();
  tasks_.clear();
  num_partials_ = 0;
  for (int s = 0; s < static_cast<int>(batch.sequences.size()); ++s) {
    const BatchSequence& sequence = batch.sequences[static_cast<std::size_t>(s)];
    for (int head = 0; head < shape_.kv_heads; ++head) {
      for (int token = 0; token < sequence.num_rows; token += tokens_per_unit_) {
        Unit unit;
        unit.sequence = s;
        unit.kv_head = head;
        unit.token = token;
        unit.tokens = std::min(tokens_per_unit_, sequence.num_rows - token);
        int first = sequence.first_position + token;
        int begin = shape_.window > 0 ? std::max(0, first - shape_.window + 1) : 0;
        int last = first + unit.tokens - 1;
        unit.first_split = begin / cpu::kKvSplit;
        unit.num_splits = last / cpu::kKvSplit - unit.first_split + 1;
        unit.cost = std::int64_t{unit.tokens + 4} * (last - begin + 64);
        units_.push_back(unit);
      }
    }
  }
  // With few units, threads share the splits of each; otherwise whole units are cheaper.
  bool divide = num_threads_ > 1 && static_cast<int>(units_.size()) < 4 * num_threads_;
  total_cost_ = 0;
  for (int u = 0; u < static_cast<int>(units_.size()); ++u) {
    Unit& unit = units_[static_cast<std::size_t>(u)];
    if (divide && unit.num_splits > 1 && num_partials_ + unit.num_splits <= partial_capacity_) {
      unit.partial = num_partials_;
      num_partials_ += unit.num_splits;
      for (int split = 0; split < unit.num_splits; ++split) {
        tasks_.push_back({u, split, total_cost_});
        total_cost_ += unit.cost / unit.num_splits;
      }
    } else {
      tasks_.push_back({u, kWhole, total_cost_});
      total_cost_ += unit.cost;
    }
  }
}

void AttentionSchedule::finish(ExecutionContext& ctx, const Unit& unit, const Batch& batch,
                               const cpu::AttentionState& state, const Activations& out) const {
  const BatchSequence& sequence = batch.sequences[static_cast<std::size_t>(unit.sequence)];
  Activations rows = out.rows_from(sequence.first_row + unit.token)
                         .columns_from(unit.kv_head * shape_.group() * shape_.head_dim);
  if (out.dtype == DType::kFloat32) {
    ctx.kernels.attention_finish_f32(state, unit.tokens, shape_.group(), shape_.head_dim,
                                     rows.f32(), out.ld);
  } else {
    ctx.kernels.attention_finish_bf16(state, unit.tokens, shape_.group(), shape_.head_dim,
                                      rows.b16(), out.ld);
  }
}

void AttentionSchedule::run_task(ExecutionContext& ctx, const Task& task, const Batch& batch,
                                 const float* q, std::ptrdiff_t ldq, const KvLayer& kv,
                                 const Activations& out) {
  const Unit& unit = units_[static_cast<std::size_t>(task.unit)];
  const BatchSequence& sequence = batch.sequences[static_cast<std::size_t>(unit.sequence)];
  cpu::QueryView query;
  query.q =
      q + (sequence.first_row + unit.token) * ldq + unit.kv_head * shape_.group() * shape_.head_dim;
  query.token_stride = ldq;
  query.tokens = unit.tokens;
  query.group = shape_.group();
  query.first_position = sequence.first_position + unit.token;
  query.window = shape_.window;
  query.scale = shape_.scale;
  query.soft_cap = shape_.soft_cap;
  cpu::KvView view = kv.view(unit.kv_head, sequence.block_table);
  auto* memory = ctx.scratch.attention.as<float>();
  float* kernel_scratch = memory + 2 * state_floats_;
  auto attend = kv.dtype == DType::kFloat32 ? ctx.kernels.attention_split_f32
                                            : ctx.kernels.attention_split_bf16;
  if (task.split != kWhole) {
    auto slot = static_cast<std::size_t>(unit.partial + task.split);
    attend(query, view, unit.first_split + task.split, kernel_scratch,
           state_at(partials_.as<float>() + slot * state_floats_));
    return;
  }
  cpu::AttentionState total = state_at(memory);
  cpu::AttentionState current = state_at(memory + state_floats_);
  attend(query, view, unit.first_split, kernel_scratch, total);
  for (int split = 1; split < unit.num_splits; ++split) {
    attend(query, view, unit.first_split + split, kernel_scratch, current);
    ctx.kernels.attention_merge(current, rows_of(unit), shape_.head_dim, total);
  }
  finish(ctx, unit, batch, total, out);
}

void AttentionSchedule::run(ExecutionContext& ctx, const Batch& batch, const float* q,
                            std::ptrdiff_t ldq, const KvLayer& kv, const Activations& out) {
  auto first_of = [&](int member) {
    auto first = std::lower_bound(
        tasks_.begin(), tasks_.end(), total_cost_ * member / ctx.member.size(),
        [](const Task& task, std::int64_t share) { return task.cost_before < share; });
    return static_cast<int>(first - tasks_.begin());
  };
  ctx.member.work(first_of(ctx.member.id()), first_of(ctx.member.id() + 1), [&](int task) {
    run_task(ctx, tasks_[static_cast<std::size_t>(task)], batch, q, ldq, kv, out);
  });
  ctx.member.barrier();
  if (num_partials_ == 0) return;
  for (std::size_t u = static_cast<std::size_t>(ctx.member.id()); u < units_.size();
       u += static_cast<std::size_t>(ctx.member.size())) {
    const Unit& unit = units_[u];
    if (unit.partial == kWhole) continue;
    float* base = partials_.as<float>() + static_cast<std::size_t>(unit.partial) * state_floats_;
    cpu::AttentionState total = state_at(base);
    for (int split = 1; split < unit.num_splits; ++split) {
      ctx.kernels.attention_merge(state_at(base + static_cast<std::size_t>(split) * state_floats_),
                                  rows_of(unit), shape_.head_dim, total);
    }
    finish(ctx, unit, batch, total, out);
  }
  ctx.member.barrier();
}

}  // namespace deinfer

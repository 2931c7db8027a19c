#include "ops/attention.h"

#include <algorithm>

namespace deinfer {
namespace {

// Query tokens of a prefill chunk that share one pass over K and V.
constexpr int kUnitTokens = 16;
// Rows of a unit of few tokens whose heads share a latent: they share its loads, and yet leave
// units for all threads.
constexpr int kSharedRows = 16;
// Rows with which heads by themselves keep the kernels' registers full.
constexpr int kFullRows = 8;
// Rows of the batch whose absorbed queries and outputs are in memory at once.
constexpr int kPassRows = 128;
static_assert(kAttentionTokens <= kPassRows);
// Memory for partial states; when it is full the remaining units run whole.
constexpr std::size_t kPartialBytes = std::size_t{16} << 20;

std::size_t aligned_floats(std::size_t count) { return (count + 15) / 16 * 16; }

std::size_t state_floats(const AttentionShape& shape) {
  auto rows = static_cast<std::size_t>(cpu::kMaxAttentionRows);
  // Merging what ranks found takes a state of one output.
  return 2 * rows + std::max(rows * aligned_floats(static_cast<std::size_t>(shape.v_width())),
                             aligned_floats(static_cast<std::size_t>(shape.head_dim)));
}

std::size_t kernel_floats(const cpu::KernelTable& kernels, const AttentionShape& shape) {
  return aligned_floats(kernels.attention_scratch(cpu::kMaxAttentionRows, shape.k_width()));
}

// A rebuilt split lies in one block; kernels may look ahead to the next.
constexpr std::int32_t kRebuiltTable[] = {0, 0};

cpu::KvSideView rebuilt_view(const std::byte* data, int split, int head_dim, int group) {
  cpu::KvSideView view;
  view.data = data;
  view.block_table = kRebuiltTable;
  view.first_position = split * cpu::kKvSplit;
  view.block_size = cpu::kKvSplit;
  view.dim = head_dim;
  view.group = group;
  return view;
}

}  // namespace

std::size_t attention_scratch_bytes(const cpu::KernelTable& kernels, const AttentionShape& shape,
                                    DType cache) {
  // The running state, the state of the current split, the kernel's own memory, rebuilt K and V.
  return (2 * state_floats(shape) + kernel_floats(kernels, shape)) * sizeof(float) +
         2 * rebuilt_split_bytes(cache, shape.head_dim);
}

AttentionSchedule::AttentionSchedule(const AttentionShape& shape, DType activations,
                                     int num_threads)
    : shape_(shape),
      activations_(activations),
      num_threads_(num_threads),
      state_floats_(state_floats(shape)),
      partial_capacity_(static_cast<int>(kPartialBytes / (state_floats_ * sizeof(float)))),
      partials_(num_threads > 1
                    ? static_cast<std::size_t>(partial_capacity_) * state_floats_ * sizeof(float)
                    : 0) {
  if (shape.absorbs_k()) {
    rounded_queries_ = ActivationBuffer(activations, kPassRows, shape.heads * shape.head_dim);
    absorbed_queries_ = Buffer(std::size_t{kPassRows} * static_cast<std::size_t>(shape.heads) *
                               static_cast<std::size_t>(shape.k_latent) * sizeof(float));
  }
  if (shape.absorbs_v()) {
    latent_outputs_ =
        ActivationBuffer(activations, kPassRows, shape.heads * padded_rank(shape.v_latent));
  }
}

cpu::AttentionState AttentionSchedule::state_at(float* memory) const {
  constexpr std::size_t kRows = cpu::kMaxAttentionRows;
  return {memory, memory + kRows, memory + 2 * kRows};
}

/// Query tokens of a run of `rows` that a unit takes.
int AttentionSchedule::tokens_of_unit(int rows) const {
  // What is rebuilt had better serve many tokens.
  const int most = shape_.rebuilds() ? cpu::kMaxAttentionRows : kUnitTokens;
  return std::clamp(cpu::kMaxAttentionRows / shape_.group(), 1, std::min(most, rows));
}

/// Heads of a unit of so many tokens.
int AttentionSchedule::heads_of_unit(int tokens) const {
  const bool shares = shape_.absorbs_k() || shape_.absorbs_v();
  const int group = shape_.group();
  if (shape_.rebuilds() || !shares || tokens * group >= kFullRows) return group;
  return std::clamp(kSharedRows / (tokens * group), 1, shape_.kv_heads) * group;
}

void AttentionSchedule::plan(const Batch& batch, int tile_tokens) {
  units_.clear();
  tasks_.clear();
  passes_.clear();
  const bool absorbs = shape_.absorbs_k() || shape_.absorbs_v();
  int rows = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    rows = std::max(rows, sequence.first_row + sequence.num_rows);
  }
  const bool sharded = shape_.token_sharded();
  const int tile = sharded ? tile_tokens : std::max(rows, 1);
  const int most = sharded ? kAttentionTokens : absorbs ? kPassRows : std::max(rows, 1);
  for (int begin = 0; begin < rows; begin += tile) {
    const int end = std::min(rows, begin + tile);
    for (int row = begin; row < end; row += most)
      plan_rows(batch, {row, std::min(end, row + most)});
  }
}

/// What the tokens of a unit see together of the KV that is here.
Range AttentionSchedule::seen(const BatchSequence& sequence, const Unit& unit) const {
  const int first = sequence.first_position + unit.token;
  const int begin = shape_.window > 0 ? std::max(0, first - shape_.window + 1) : 0;
  return {shape_.share.before(begin), shape_.share.before(first + unit.tokens)};
}

void AttentionSchedule::plan_rows(const Batch& batch, Range rows) {
  Pass pass;
  pass.rows = rows;
  pass.units.begin = static_cast<int>(units_.size());
  for (int s = 0; s < static_cast<int>(batch.sequences.size()); ++s) {
    const BatchSequence& sequence = batch.sequences[static_cast<std::size_t>(s)];
    const int begin = std::max(rows.begin - sequence.first_row, 0);
    const int end = std::min(rows.end - sequence.first_row, sequence.num_rows);
    if (begin >= end) continue;
    const int tokens = tokens_of_unit(end - begin);
    const int heads = heads_of_unit(tokens);
    for (int head = 0; head < shape_.heads; head += heads) {
      for (int token = begin; token < end; token += tokens) {
        Unit unit;
        unit.sequence = s;
        unit.head = head;
        unit.heads = std::min(heads, shape_.heads - head);
        unit.token = token;
        unit.tokens = std::min(tokens, end - token);
        const Range range = seen(sequence, unit);
        const int last = std::max(range.begin, range.end - 1);  // other ranks may have all
        unit.first_split = range.begin / cpu::kKvSplit;
        unit.num_splits = last / cpu::kKvSplit - unit.first_split + 1;
        unit.cost = std::int64_t{unit.tokens + 4} * (unit.heads / shape_.group()) *
                    (last - range.begin + 64);
        units_.push_back(unit);
      }
    }
  }
  pass.units.end = static_cast<int>(units_.size());
  plan_tasks(pass);
  passes_.push_back(pass);
}

void AttentionSchedule::plan_tasks(Pass& pass) {
  // With few units, threads share the splits of each; otherwise whole units are cheaper.
  const bool divide = num_threads_ > 1 && pass.units.size() < 4 * num_threads_;
  int partials = 0;
  pass.tasks.begin = static_cast<int>(tasks_.size());
  for (int u = pass.units.begin; u < pass.units.end; ++u) {
    Unit& unit = units_[static_cast<std::size_t>(u)];
    if (divide && unit.num_splits > 1 && partials + unit.num_splits <= partial_capacity_) {
      unit.partial = partials;
      partials += unit.num_splits;
      for (int split = 0; split < unit.num_splits; ++split) {
        tasks_.push_back({u, split, pass.cost});
        pass.cost += unit.cost / unit.num_splits;
      }
    } else {
      tasks_.push_back({u, kWhole, pass.cost});
      pass.cost += unit.cost;
    }
  }
  pass.tasks.end = static_cast<int>(tasks_.size());
  pass.divides = partials > 0;
}

/// [rows of the pass, heads, r padded to 2].
Activations AttentionSchedule::latent_outputs(const Call& call) {
  Activations view = latent_outputs_.view();
  view.ld = std::ptrdiff_t{shape_.heads} * padded_rank(call.v_dim);
  return view;
}

void AttentionSchedule::finish(ExecutionContext& ctx, const Unit& unit,
                               const cpu::AttentionState& state, const Call& call) {
  const BatchSequence& sequence = call.batch.sequences[static_cast<std::size_t>(unit.sequence)];
  const int row = sequence.first_row + unit.token;
  int width = shape_.head_dim;
  Activations out = call.out.rows_from(row);
  if (shape_.token_sharded()) {
    contribute(unit, row - call.first_row, state, call);
    if (!shape_.absorbs_v()) return;
  }
  if (shape_.absorbs_v()) {
    width = padded_rank(call.v_dim);
    out = latent_outputs(call).rows_from(row - call.first_row);
  }
  out = out.columns_from(std::ptrdiff_t{unit.head} * width);
  if (out.dtype == DType::kFloat32) {
    ctx.kernels.attention_finish_f32(state, unit.tokens, unit.heads, call.v_dim, out.f32(), out.ld,
                                     width);
  } else {
    ctx.kernels.attention_finish_bf16(state, unit.tokens, unit.heads, call.v_dim, out.b16(), out.ld,
                                      width);
  }
  if (width == call.v_dim) return;
  for (int i = 0; i < unit.rows(); ++i) {  // what products read after an odd rank
    Activations end = out.rows_from(i / unit.heads)
                          .columns_from(std::ptrdiff_t{i % unit.heads} * width + call.v_dim);
    std::fill_n(static_cast<std::byte*>(end.data), dtype_size(end.dtype), std::byte{0});
  }
}

/// K and V of a split as the kernels read them, rebuilt in the scratch memory if need be.
cpu::KvView AttentionSchedule::view_of(ExecutionContext& ctx, const Unit& unit, int split,
                                       const Call& call) const {
  const BatchSequence& sequence = call.batch.sequences[static_cast<std::size_t>(unit.sequence)];
  const std::int32_t* table = sequence.block_table;
  const int kv_head = unit.head / shape_.group();
  const Range range = seen(sequence, unit);
  const Range positions{std::max(range.begin, split * cpu::kKvSplit),
                        std::min(range.end, (split + 1) * cpu::kKvSplit)};
  auto* memory = reinterpret_cast<std::byte*>(
      ctx.scratch.attention.as<float>() + 2 * state_floats_ + kernel_floats(ctx.kernels, shape_));
  cpu::KvView view;
  switch (shape_.forms.k) {
    case KvForm::kDense: view.k = call.kv.k.view(kv_head, shape_.group(), table); break;
    case KvForm::kAbsorbed: view.k = call.kv.k.view(0, unit.heads, table); break;
    case KvForm::kRebuilt:
      rebuild_keys(ctx, call.latents, call.kv.k, shape_.counts(), kv_head, table, positions,
                   memory);
      view.k = rebuilt_view(memory, split, shape_.head_dim, unit.heads);
      break;
  }
  switch (shape_.forms.v) {
    case KvForm::kDense: view.v = call.kv.v.view(kv_head, shape_.group(), table); break;
    case KvForm::kAbsorbed: view.v = call.kv.v.view(0, unit.heads, table); break;
    case KvForm::kRebuilt:
      memory += rebuilt_split_bytes(call.kv.k.dtype, shape_.head_dim);
      rebuild_values(ctx, call.latents, call.kv.v, shape_.counts(), kv_head, table, positions,
                     memory);
      view.v = rebuilt_view(memory, split, shape_.head_dim, unit.heads);
      break;
  }
  return view;
}

void AttentionSchedule::run_task(ExecutionContext& ctx, const Task& task, const Call& call) {
  const Unit& unit = units_[static_cast<std::size_t>(task.unit)];
  const BatchSequence& sequence = call.batch.sequences[static_cast<std::size_t>(unit.sequence)];
  const int row = sequence.first_row + unit.token;
  cpu::QueryView query;
  query.q = call.q + row * call.ldq + std::ptrdiff_t{unit.head} * shape_.head_dim;
  query.token_stride = call.ldq;
  if (shape_.absorbs_k()) {
    query.token_stride = std::ptrdiff_t{shape_.heads} * call.k_dim;
    query.q = absorbed_queries_.as<float>() + (row - call.first_row) * query.token_stride +
              std::ptrdiff_t{unit.head} * call.k_dim;
  }
  query.tokens = unit.tokens;
  query.heads = unit.heads;
  query.first_position = sequence.first_position + unit.token;
  query.window = shape_.window;
  query.scale = shape_.scale;
  query.soft_cap = shape_.soft_cap;
  query.share = shape_.share;
  auto* memory = ctx.scratch.attention.as<float>();
  auto attend = [&](int split, const cpu::AttentionState& state) {
    const bool f32 = call.kv.k.dtype == DType::kFloat32;
    auto kernel = f32 ? ctx.kernels.attention_split_f32 : ctx.kernels.attention_split_bf16;
    kernel(query, view_of(ctx, unit, split, call), split, memory + 2 * state_floats_, state);
  };
  if (task.split != kWhole) {
    auto slot = static_cast<std::size_t>(unit.partial + task.split);
    attend(unit.first_split + task.split, state_at(partials_.as<float>() + slot * state_floats_));
    return;
  }
  cpu::AttentionState total = state_at(memory);
  cpu::AttentionState current = state_at(memory + state_floats_);
  attend(unit.first_split, total);
  for (int split = 1; split < unit.num_splits; ++split) {
    attend(unit.first_split + split, current);
    ctx.kernels.attention_merge(current, unit.rows(), call.v_dim, total);
  }
  finish(ctx, unit, total, call);
}

void AttentionSchedule::merge_partials(ExecutionContext& ctx, const Pass& pass, const Call& call) {
  for (int u = pass.units.begin + ctx.member.id(); u < pass.units.end; u += ctx.member.size()) {
    const Unit& unit = units_[static_cast<std::size_t>(u)];
    if (unit.partial == kWhole) continue;
    float* base = partials_.as<float>() + static_cast<std::size_t>(unit.partial) * state_floats_;
    cpu::AttentionState total = state_at(base);
    for (int split = 1; split < unit.num_splits; ++split) {
      ctx.kernels.attention_merge(state_at(base + static_cast<std::size_t>(split) * state_floats_),
                                  unit.rows(), call.v_dim, total);
    }
    finish(ctx, unit, total, call);
  }
}

void AttentionSchedule::absorb_queries(ExecutionContext& ctx, const Pass& pass, const Call& call) {
  const int rows = pass.rows.size();
  const float* q = call.q + pass.rows.begin * call.ldq;
  Activations x{const_cast<float*>(q), DType::kFloat32, call.ldq};
  if (activations_ == DType::kBFloat16) {
    x = rounded_queries_.view();
    auto [begin, end] = ctx.member.share(rows);
    for (int i = begin; i < end; ++i) {
      ctx.kernels.copy_row_bf16(q + i * call.ldq, shape_.heads * shape_.head_dim,
                                x.rows_from(i).b16());
    }
    ctx.member.barrier();
  }
  absorb_keys(ctx, rows, call.latents, shape_.counts(), x, absorbed_queries_.as<float>());
}

void AttentionSchedule::run(ExecutionContext& ctx, const Batch& batch, const float* q,
                            std::ptrdiff_t ldq, const KvLayer& kv, const LatentKv& latents,
                            const Activations& out) {
  Call call{batch, q, ldq, kv, latents, out, shape_.head_dim, shape_.head_dim, 0};
  if (shape_.absorbs_k()) call.k_dim = kv.k.shape.dim;
  if (shape_.absorbs_v()) call.v_dim = kv.v.shape.dim;
  for (const Pass& pass : passes_) {
    call.first_row = pass.rows.begin;
    if (shape_.token_sharded()) call.partial = ctx.floats_to_send();
    if (shape_.absorbs_k()) absorb_queries(ctx, pass, call);
    auto first_of = [&](int member) {
      auto begin = tasks_.begin() + pass.tasks.begin;
      auto first = std::lower_bound(
          begin, tasks_.begin() + pass.tasks.end, pass.cost * member / ctx.member.size(),
          [](const Task& task, std::int64_t share) { return task.cost_before < share; });
      return static_cast<int>(first - tasks_.begin());
    };
    ctx.member.work(first_of(ctx.member.id()), first_of(ctx.member.id() + 1),
                    [&](int task) { run_task(ctx, tasks_[static_cast<std::size_t>(task)], call); });
    ctx.member.barrier();
    if (pass.divides) {
      merge_partials(ctx, pass, call);
      ctx.member.barrier();
    }
    if (shape_.absorbs_v()) {
      const Activations partial{call.partial, DType::kFloat32, partial_columns()};
      expand_values(ctx, pass.rows.size(), latents, shape_.counts(), latent_outputs(call),
                    shape_.token_sharded() ? partial : out.rows_from(pass.rows.begin));
    }
    if (!shape_.token_sharded()) continue;
    if (shape_.absorbs_v()) scale_contribution(ctx, pass, call);
    merge_ranks(ctx, pass, call);
  }
}

}  // namespace deinfer

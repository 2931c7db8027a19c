#include "ops/latent_kv.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "ops/qk_norm.h"

namespace deinfer {
namespace {

constexpr int kMaxJobs = 32;    // heads whose products are shared out together
constexpr int kRunTokens = 64;  // positions that are rebuilt at once
constexpr int kScratchFloats = kTileTokens * cpu::kPanelRows;  // of ThreadScratch::tile_b

const float* bias_of(const LowRankLinear& linear) {
  return linear.has_bias() ? linear.bias.as<float>() : nullptr;
}

/// f(z of the positions [first, first + count), first, count) for runs within blocks.
template <typename F>
void for_each_run(const KvSide& side, const std::int32_t* block_table, Range positions, int most,
                  F f) {
  for (int p = positions.begin; p < positions.end;) {
    const int offset = p % side.block_size;
    const int count = std::min({side.block_size - offset, positions.end - p, most});
    std::byte* block = side.at(block_table[p / side.block_size], 0);
    const Activations pool{block, side.dtype, side.shape.dim};
    f(pool.rows_from(offset), p, count);
    p += count;
  }
}

/// The panels that have rows of kv head `head`, packed in order.
Range panels_of(const cpu::PackedMatrix& matrix, int head, int head_dim) {
  const int end = (head + 1) * head_dim;
  return {head * head_dim / matrix.panel_rows, (end + matrix.panel_rows - 1) / matrix.panel_rows};
}

/// The columns that a panel of `cols` rows from `first` on has of kv head `head`.
Range columns_of(int head, int head_dim, int first, int cols) {
  return {std::max(first, head * head_dim), std::min(first + cols, (head + 1) * head_dim)};
}

/// rows[count, head_dim] (fp32) = U z + b of kv head `head`, packed in order.
void head_rows(ExecutionContext& ctx, const LowRankLinear& linear, const Activations& z, int count,
               int head, int head_dim, float* rows) {
  const cpu::PackedMatrix& u = linear.u;
  auto* tile = ctx.scratch.tile_a.as<float>();
  const Range panels = panels_of(u, head, head_dim);
  ctx.scratch.expanded.forget();
  for (int panel = panels.begin; panel < panels.end; ++panel) {
    multiply_panel(ctx.kernels, u, {0, u.k_pad}, z, count, panel, nullptr, ctx.scratch.expanded,
                   tile);
    const int first = panel * u.panel_rows;
    const Range columns = columns_of(head, head_dim, first, u.rows_of(panel));
    const float* bias = bias_of(linear);
    ctx.kernels.store_f32(tile + columns.begin - first, count, columns.size(),
                          bias == nullptr ? nullptr : bias + columns.begin,
                          rows + columns.begin - head * head_dim, head_dim);
  }
}

/// A kv head's columns of an output factor, to one head of the attention's output.
class StoreHead final : public Epilogue {
 public:
  StoreHead() = default;
  StoreHead(const LowRankLinear& linear, int kv_head, int head_dim, const Activations& out)
      : bias_(bias_of(linear)), kv_head_(kv_head), head_dim_(head_dim), out_(out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    const Range columns = columns_of(kv_head_, head_dim_, first, cols);
    if (columns.size() <= 0) return;
    const float* from = tile + columns.begin - first;
    const float* bias = bias_ == nullptr ? nullptr : bias_ + columns.begin;
    Activations out = out_.rows_from(row).columns_from(columns.begin - kv_head_ * head_dim_);
    if (out.dtype == DType::kFloat32) {
      kernels.store_f32(from, m, columns.size(), bias, out.f32(), out.ld);
    } else {
      kernels.store_bf16(from, m, columns.size(), bias, out.b16(), out.ld);
    }
  }

 private:
  const float* bias_ = nullptr;
  int kv_head_ = 0;
  int head_dim_ = 0;
  Activations out_;
};

class StoreQueryHead final : public Epilogue {
 public:
  StoreQueryHead() = default;
  StoreQueryHead(int rank, float* out, std::ptrdiff_t ld) : rank_(rank), out_(out), ld_(ld) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    const int valid = std::min(cols, rank_ - first);
    if (valid <= 0) return;
    kernels.store_f32(tile, m, valid, nullptr, out_ + row * ld_ + first, ld_);
  }

 private:
  int rank_ = 0;
  float* out_ = nullptr;
  std::ptrdiff_t ld_ = 0;
};

/// The products of heads, job(head, epilogue) each, some heads at a time.
template <typename Store, typename F>
void run_heads(ExecutionContext& ctx, int m, int heads, F job_of) {
  std::array<PanelJob, kMaxJobs> jobs;
  std::array<Store, kMaxJobs> stores;
  for (int first = 0; first < heads; first += kMaxJobs) {
    const int count = std::min(kMaxJobs, heads - first);
    for (int i = 0; i < count; ++i) {
      auto at = static_cast<std::size_t>(i);
      jobs[at] = job_of(first + i, stores[at]);
      jobs[at].epilogue = &stores[at];
    }
    run_jobs(ctx, std::span(jobs.data(), static_cast<std::size_t>(count)), 0, m);
    ctx.member.barrier();
  }
}

}  // namespace

void StoreLatent::store(const Activations& z, int row) const {
  const KvSlot slot = slots_[static_cast<std::size_t>(row)];
  if (slot.block < 0) return;
  std::byte* block = side_.at(slot.block, 0);
  const Activations from = z.rows_from(row);
  if (!by_groups_) {
    const Activations to{block, side_.dtype, side_.shape.dim};
    std::memcpy(to.rows_from(slot.offset).data, from.data,
                static_cast<std::size_t>(columns_) * dtype_size(side_.dtype));
    return;
  }
  const std::ptrdiff_t first = std::ptrdiff_t{slot.offset / cpu::kLanes} * cpu::kLanes * columns_ +
                               slot.offset % cpu::kLanes;
  auto scatter = [&](const auto* values, auto* to) {
    for (int i = 0; i < columns_; ++i) to[first + std::ptrdiff_t{i} * cpu::kLanes] = values[i];
  };
  if (side_.dtype == DType::kFloat32) {
    scatter(from.f32(), reinterpret_cast<float*>(block));
  } else {
    scatter(from.b16(), reinterpret_cast<bf16*>(block));
  }
}

void store_key_scale(const KvSide& side, KvSlot slot, float scale) {
  if (slot.block < 0) return;
  const auto row = static_cast<std::size_t>(side.shape.dim) * dtype_size(side.dtype);
  std::memcpy(
      side.at(slot.block, 0) + static_cast<std::size_t>(slot.offset + 1) * row - sizeof scale,
      &scale, sizeof scale);
}

std::size_t rebuilt_split_bytes(DType dtype, int head_dim) {
  return static_cast<std::size_t>(cpu::kKvSplit) * static_cast<std::size_t>(head_dim) *
         dtype_size(dtype);
}

void rebuild_keys(ExecutionContext& ctx, const LatentKv& latents, const KvSide& side,
                  const HeadCounts& counts, int head, const std::int32_t* block_table,
                  Range positions, std::byte* out) {
  const LowRankLinear& linear = *latents.key;
  const int head_dim = counts.head_dim;
  const int half = head_dim / 2;
  const int base = positions.begin / cpu::kKvSplit * cpu::kKvSplit;
  const RotaryAngles& angles = latents.angles;
  const cpu::KernelTable& kernels = ctx.kernels;
  auto write = side.dtype == DType::kFloat32 ? kernels.write_k_f32 : kernels.write_k_bf16;
  auto* tile = ctx.scratch.tile_a.as<float>();
  auto* rows = ctx.scratch.tile_b.as<float>();
  const bool tiles_turn = angles.cos != nullptr && latents.key_norm_kind == QkNormKind::kNone;
  const int most = std::min(kRunTokens, kScratchFloats / head_dim);
  for_each_run(side, block_table, positions, most, [&](const Activations& z, int p, int count) {
    const std::ptrdiff_t angle = side.share().position(p) * angles.ld;
    if (tiles_turn) {  // packed so that pairs meet
      const int panels = (half + cpu::kLanes - 1) / cpu::kLanes;
      ctx.scratch.expanded.forget();
      for (int i = 0; i < panels; ++i) {
        const int panel = head * panels + i;
        const int pair = i * cpu::kLanes;
        const float* bias = bias_of(linear);
        multiply_panel(kernels, linear.u, {0, linear.u.k_pad}, z, count, panel, nullptr,
                       ctx.scratch.expanded, tile);
        kernels.rope_tile(tile, count, bias == nullptr ? nullptr : bias + panel * cpu::kPanelRows,
                          angles.cos + angle + pair, angles.sin + angle + pair, angles.ld);
        const int pairs = std::min(cpu::kLanes, half - pair);
        for (int row = 0; row < count; ++row) {
          const float* values = tile + std::ptrdiff_t{row} * cpu::kPanelRows;
          write(values, pairs, pair, head_dim, p + row - base, out);
          write(values + cpu::kLanes, pairs, half + pair, head_dim, p + row - base, out);
        }
      }
      return;
    }
    head_rows(ctx, linear, z, count, head, head_dim, rows);
    for (int row = 0; row < count; ++row) {
      float* values = rows + std::ptrdiff_t{row} * head_dim;
      if (latents.key_norm_kind == QkNormKind::kPerHead) {
        normalize_row(kernels, values, head_dim, *latents.key_norm, {values, DType::kFloat32, 0});
      } else if (latents.key_norm_kind == QkNormKind::kFull) {
        const float* gain = latents.key_norm->gain.data() + std::ptrdiff_t{head} * head_dim;
        kernels.apply_gain_f32(values, gain, head_dim, values);
        float scale = 0;
        std::memcpy(&scale, z.rows_from(row).columns_from(linear.u.k_pad).data, sizeof scale);
        kernels.scale_row(values, head_dim, scale);
      }
      if (angles.cos != nullptr) {
        const std::ptrdiff_t at = angle + row * angles.ld;
        rotate_head(kernels, values, head_dim, angles.cos + at, angles.sin + at);
      }
      write(values, head_dim, 0, head_dim, p + row - base, out);
    }
  });
}

void rebuild_values(ExecutionContext& ctx, const LatentKv& latents, const KvSide& side,
                    const HeadCounts& counts, int head, const std::int32_t* block_table,
                    Range positions, std::byte* out) {
  const int head_dim = counts.head_dim;
  const int base = positions.begin / cpu::kKvSplit * cpu::kKvSplit;
  auto write = side.dtype == DType::kFloat32 ? ctx.kernels.write_v_f32 : ctx.kernels.write_v_bf16;
  auto* rows = ctx.scratch.tile_b.as<float>();
  const int most = std::min(kRunTokens, kScratchFloats / head_dim);
  for_each_run(side, block_table, positions, most, [&](const Activations& z, int p, int count) {
    head_rows(ctx, *latents.value, z, count, head, head_dim, rows);
    for (int row = 0; row < count; ++row) {
      write(rows + std::ptrdiff_t{row} * head_dim, head_dim, 0, head_dim, p + row - base, out);
    }
  });
}

void absorb_keys(ExecutionContext& ctx, int m, const LatentKv& latents, const HeadCounts& counts,
                 const Activations& q, float* out) {
  const int rank = latents.key->inner_size();
  const std::ptrdiff_t ld = std::ptrdiff_t{counts.heads} * rank;
  run_heads<StoreQueryHead>(ctx, m, counts.heads, [&](int head, StoreQueryHead& store) {
    store = {rank, out + std::ptrdiff_t{head} * rank, ld};
    PanelJob job;
    job.matrix = &latents.absorbed_key[static_cast<std::size_t>(head / counts.group())];
    job.x = q.columns_from(std::ptrdiff_t{head} * counts.head_dim);
    return job;
  });
}

void expand_values(ExecutionContext& ctx, int m, const LatentKv& latents, const HeadCounts& counts,
                   const Activations& x, const Activations& out) {
  const LowRankLinear& linear = *latents.value;
  run_heads<StoreHead>(ctx, m, counts.heads, [&](int head, StoreHead& store) {
    const int kv_head = head / counts.group();
    store = {linear, kv_head, counts.head_dim,
             out.columns_from(std::ptrdiff_t{head} * counts.head_dim)};
    PanelJob job;
    job.matrix = &linear.u;
    job.panels = panels_of(linear.u, kv_head, counts.head_dim);
    job.x = x.columns_from(std::ptrdiff_t{head} * linear.u.k_pad);
    return job;
  });
}

std::vector<cpu::PackedMatrix> transposed_heads(const LowRankLinear& linear, int kv_heads,
                                                int head_dim, ThreadTeam& team) {
  const cpu::PackedMatrix& u = linear.u;
  // int8 rows have a scale each, which columns cannot take over.
  const DType dtype = u.dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  const auto rank = static_cast<std::size_t>(u.k);
  std::vector<cpu::PackedMatrix> heads;
  for (int head = 0; head < kv_heads; ++head) {
    heads.push_back(cpu::allocate_packed(dtype, u.k, head_dim, cpu::kPanelRows));
  }
  team.run([&](TeamMember& member) {
    std::vector<float> row(rank);
    std::vector<float> transposed(rank * static_cast<std::size_t>(head_dim));
    auto [first, last] = member.share(kv_heads);
    for (int head = first; head < last; ++head) {
      for (int d = 0; d < head_dim; ++d) {
        u.read_row(head * head_dim + d, row.data());
        for (std::size_t i = 0; i < rank; ++i) {
          transposed[i * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(d)] = row[i];
        }
      }
      cpu::PackedMatrix& packed = heads[static_cast<std::size_t>(head)];
      const TensorView view{transposed.data(), DType::kFloat32, u.k, head_dim, head_dim};
      cpu::pack_rows(view, {}, 0, packed.num_panels(), packed);
    }
  });
  return heads;
}

}  // namespace deinfer

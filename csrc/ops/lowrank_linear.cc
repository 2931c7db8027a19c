#include "ops/lowrank_linear.h"

#include <algorithm>
#include <array>
#include <limits>

#include "ops/latent_kv.h"
#include "ops/z_exchange.h"

namespace deinfer {
namespace {

const float* bias_at(const LowRankLinear& linear, int first) {
  return linear.has_bias() ? linear.bias.as<float>() + first : nullptr;
}

/// Caps `cols` columns of m rows that are ld elements apart, if there is a cap.
void cap_rows(const cpu::KernelTable& kernels, float* rows, std::ptrdiff_t ld, int m, int cols,
              float soft_cap) {
  if (soft_cap == 0.0f) return;
  for (int i = 0; i < m; ++i) kernels.soft_cap(rows + i * ld, cols, soft_cap);
}

class StoreOutput final : public Epilogue {
 public:
  StoreOutput(const LowRankLinear& linear, float* out, std::ptrdiff_t ldo, bool add,
              float soft_cap = 0.0f)
      : linear_(linear), out_(out), ldo_(ldo), add_(add), soft_cap_(soft_cap) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_.output_factor().n - first);
    auto store = add_ ? kernels.add_f32 : kernels.store_f32;
    float* out = out_ + row * ldo_ + first;
    store(tile, m, valid, bias_at(linear_, first), out, ldo_);
    cap_rows(kernels, out, ldo_, m, valid, soft_cap_);
  }

 private:
  const LowRankLinear& linear_;
  float* out_;
  std::ptrdiff_t ldo_;
  bool add_;
  float soft_cap_;
};

/// In the activation type.
class StoreActivations final : public Epilogue {
 public:
  StoreActivations() = default;
  StoreActivations(const LowRankLinear& linear, const Activations& out)
      : linear_(&linear), out_(out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_->output_factor().n - first);
    Activations out = out_.rows_from(row).columns_from(first);
    if (out_.dtype == DType::kFloat32) {
      kernels.store_f32(tile, m, valid, bias_at(*linear_, first), out.f32(), out_.ld);
    } else {
      kernels.store_bf16(tile, m, valid, bias_at(*linear_, first), out.b16(), out_.ld);
    }
  }

 private:
  const LowRankLinear* linear_ = nullptr;
  Activations out_;
};

class TakeMaximum final : public Epilogue {
 public:
  TakeMaximum(const LowRankLinear& linear, RowMaximum& maximum, float soft_cap)
      : linear_(linear), maximum_(maximum), soft_cap_(soft_cap) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_.output_factor().n - first);
    const float* bias = bias_at(linear_, first);
    if (soft_cap_ != 0.0f) {
      kernels.store_f32(tile, m, valid, bias, tile, cpu::kPanelRows);
      cap_rows(kernels, tile, cpu::kPanelRows, m, valid, soft_cap_);
      bias = nullptr;
    }
    kernels.argmax_tile(tile, m, valid, bias, first, maximum_.value.data() + row,
                        maximum_.index.data() + row);
  }

 private:
  const LowRankLinear& linear_;
  RowMaximum& maximum_;
  float soft_cap_;
};

class StoreGated final : public Epilogue {
 public:
  StoreGated(const LowRankLinear& gate, const LowRankLinear& up, GateKind kind, Activations out)
      : gate_(gate), up_(up), kind_(kind), out_(out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float* second, int row, int m,
             int first, int cols) const override {
    int valid = std::min(cols, gate_.output_factor().n - first);
    Activations out = out_.rows_from(row).columns_from(first);
    const float* gate_bias = bias_at(gate_, first);
    const float* up_bias = bias_at(up_, first);
    const bool silu = kind_ == GateKind::kSilu;
    if (out_.dtype == DType::kFloat32) {
      auto store = silu ? kernels.silu_mul_f32 : kernels.gelu_tanh_mul_f32;
      store(tile, second, m, valid, gate_bias, up_bias, out.f32(), out_.ld);
    } else {
      auto store = silu ? kernels.silu_mul_bf16 : kernels.gelu_tanh_mul_bf16;
      store(tile, second, m, valid, gate_bias, up_bias, out.b16(), out_.ld);
    }
  }

 private:
  const LowRankLinear& gate_;
  const LowRankLinear& up_;
  GateKind kind_;
  Activations out_;
};

class StoreRelu final : public Epilogue {
 public:
  StoreRelu(const LowRankLinear& linear, Activations out) : linear_(linear), out_(out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_.output_factor().n - first);
    Activations out = out_.rows_from(row).columns_from(first);
    if (out_.dtype == DType::kFloat32) {
      kernels.relu_f32(tile, m, valid, bias_at(linear_, first), out.f32(), out_.ld);
    } else {
      kernels.relu_bf16(tile, m, valid, bias_at(linear_, first), out.b16(), out_.ld);
    }
  }

 private:
  const LowRankLinear& linear_;
  Activations out_;
};

/// A tile of rotary pairs of one head: rotates it and hands both halves to store(values, stride,
/// count, first dimension).
class RotaryTile {
 public:
  RotaryTile(const LowRankLinear& linear, const QkvOutput& out)
      : linear_(linear),
        out_(out),
        half_(out.head_dim / 2),
        panels_per_head_((half_ + cpu::kLanes - 1) / cpu::kLanes) {}

  int head(int first) const { return first / cpu::kPanelRows / panels_per_head_; }

  template <typename Store>
  void rotate(const cpu::KernelTable& kernels, float* tile, int row, int m, int first,
              Store&& store) const {
    int pair = first / cpu::kPanelRows % panels_per_head_ * cpu::kLanes;
    const RotaryAngles& angles = out_.angles;
    kernels.rope_tile(tile, m, bias_at(linear_, first), angles.cos + row * angles.ld + pair,
                      angles.sin + row * angles.ld + pair, angles.ld);
    int count = std::min(cpu::kLanes, half_ - pair);
    store(tile, count, pair);
    store(tile + cpu::kLanes, count, half_ + pair);
  }

 private:
  const LowRankLinear& linear_;
  const QkvOutput& out_;
  int half_;
  int panels_per_head_;
};

class StoreQuery final : public Epilogue {
 public:
  StoreQuery(const LowRankLinear& linear, const QkvOutput& out) : out_(out), tile_(linear, out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int) const override {
    float* head = out_.q + row * out_.ldq + tile_.head(first) * out_.head_dim;
    tile_.rotate(kernels, tile, row, m, first, [&](const float* half, int count, int d0) {
      kernels.store_f32(half, m, count, nullptr, head + d0, out_.ldq);
    });
  }

 private:
  const QkvOutput& out_;
  RotaryTile tile_;
};

class StoreKey final : public Epilogue {
 public:
  StoreKey(const LowRankLinear& linear, const QkvOutput& out) : out_(out), tile_(linear, out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int) const override {
    const KvSide& side = out_.kv.k;
    auto write = side.dtype == DType::kFloat32 ? kernels.write_k_f32 : kernels.write_k_bf16;
    int head = tile_.head(first);
    tile_.rotate(kernels, tile, row, m, first, [&](const float* half, int count, int d0) {
      for (int i = 0; i < m; ++i) {
        KvSlot slot = out_.slots[static_cast<std::size_t>(row + i)];
        if (slot.block < 0) continue;
        write(half + std::ptrdiff_t{i} * cpu::kPanelRows, count, d0, out_.head_dim, slot.offset,
              side.at(slot.block, head));
      }
    });
  }

 private:
  const QkvOutput& out_;
  RotaryTile tile_;
};

/// V, or K that is not rotated, to the cache.
class StoreCached final : public Epilogue {
 public:
  StoreCached(const LowRankLinear& linear, const QkvOutput& out, bool is_key)
      : linear_(linear), out_(out), is_key_(is_key) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    const KvSide& side = is_key_ ? out_.kv.k : out_.kv.v;
    bool f32 = side.dtype == DType::kFloat32;
    auto write_v = f32 ? kernels.write_v_f32 : kernels.write_v_bf16;
    auto write_k = f32 ? kernels.write_k_f32 : kernels.write_k_bf16;
    auto write = is_key_ ? write_k : write_v;
    int valid = std::min(cols, linear_.output_factor().n - first);
    for (int i = 0; i < m; ++i) {
      KvSlot slot = out_.slots[static_cast<std::size_t>(row + i)];
      if (slot.block < 0) continue;
      float* values = tile + std::ptrdiff_t{i} * cpu::kPanelRows;
      if (linear_.has_bias()) {
        for (int j = 0; j < valid; ++j) values[j] += bias_at(linear_, first)[j];
      }
      for (int j = 0; j < valid;) {  // a panel may span heads
        int head = (first + j) / out_.head_dim;
        int d0 = (first + j) % out_.head_dim;
        int count = std::min(valid - j, out_.head_dim - d0);
        write(values + j, count, d0, out_.head_dim, slot.offset, side.at(slot.block, head));
        j += count;
      }
    }
  }

 private:
  const LowRankLinear& linear_;
  const QkvOutput& out_;
  bool is_key_;
};

void linear_to_f32(ExecutionContext& ctx, int m, const GroupInput& input,
                   const LowRankLinear& linear, const Activations& z, float* out,
                   std::ptrdiff_t ldo, bool add, float soft_cap) {
  StoreOutput epilogue(linear, out, ldo, add, soft_cap);
  Branch branch{&linear, &epilogue, nullptr, nullptr};
  run_group(ctx, m, input, z, std::span(&branch, 1));
}

}  // namespace

void lowrank_linear(ExecutionContext& ctx, int m, const GroupInput& input,
                    const LowRankLinear& linear, const Activations& z, float* out,
                    std::ptrdiff_t ldo, float soft_cap) {
  linear_to_f32(ctx, m, input, linear, z, out, ldo, false, soft_cap);
}

void lowrank_linears(ExecutionContext& ctx, int m, const GroupInput& input,
                     std::span<const LowRankLinear> linears, const Activations& z,
                     std::span<const Activations> outs) {
  std::array<StoreActivations, kMaxLinears> epilogues;
  std::array<Branch, kMaxLinears> branches;
  for (std::size_t i = 0; i < linears.size(); ++i) {
    epilogues[i] = {linears[i], outs[i]};
    branches[i] = {&linears[i], &epilogues[i], nullptr, nullptr};
  }
  run_group(ctx, m, input, z, std::span(branches.data(), linears.size()));
}

void lowrank_linear_add(ExecutionContext& ctx, int m, const GroupInput& input,
                        const LowRankLinear& linear, const Activations& z, float* residual,
                        std::ptrdiff_t ldr) {
  linear_to_f32(ctx, m, input, linear, z, residual, ldr, true, 0.0f);
}

void lowrank_argmax(ExecutionContext& ctx, int m, const GroupInput& input,
                    const LowRankLinear& linear, const Activations& z, std::span<RowMaximum> maxima,
                    float* value, int* index, float soft_cap) {
  RowMaximum& mine = maxima[static_cast<std::size_t>(ctx.member.id())];
  std::fill_n(mine.value.begin(), m, -std::numeric_limits<float>::infinity());
  std::fill_n(mine.index.begin(), m, 0);
  TakeMaximum epilogue(linear, mine, soft_cap);
  Branch branch{&linear, &epilogue, nullptr, nullptr};
  run_group(ctx, m, input, z, std::span(&branch, 1));
  auto [begin, end] = ctx.member.share(m);
  for (int i = begin; i < end; ++i) {
    auto row = static_cast<std::size_t>(i);
    const RowMaximum* best = &maxima[0];
    for (const RowMaximum& other : maxima) {
      bool equal = other.value[row] == best->value[row];
      bool lower = other.index[row] < best->index[row];
      if (other.value[row] > best->value[row] || (equal && lower)) best = &other;
    }
    value[i] = best->value[row];
    index[i] = best->index[row];
  }
  ctx.member.barrier();
}

void lowrank_gated_mlp(ExecutionContext& ctx, int m, const GroupInput& input,
                       const LowRankLinear& gate, const LowRankLinear& up, GateKind kind,
                       const Activations& z, const Activations& out) {
  StoreGated epilogue(gate, up, kind, out);
  Branch branch{&gate, &epilogue, &up, nullptr};
  run_group(ctx, m, input, z, std::span(&branch, 1));
}

void lowrank_relu(ExecutionContext& ctx, int m, const GroupInput& input,
                  const LowRankLinear& linear, const Activations& z, const Activations& out) {
  StoreRelu epilogue(linear, out);
  Branch branch{&linear, &epilogue, nullptr, nullptr};
  run_group(ctx, m, input, z, std::span(&branch, 1));
}

void lowrank_qkv(ExecutionContext& ctx, int m, const GroupInput& input, const LowRankLinear& query,
                 const LowRankLinear& key, const LowRankLinear& value, const Activations& z,
                 const QkvOutput& out) {
  StoreQuery rotated_query(query, out);
  StoreKey rotated_key(key, out);
  StoreOutput plain_query(query, out.q, out.ldq, false);
  StoreOutput plain_key(key, out.k, out.ldk, false);
  StoreCached cached_key(key, out, true);
  StoreCached cached_value(value, out, false);
  const Epilogue* store_query = &rotated_query;
  const Epilogue* store_key = &rotated_key;
  if (out.angles.cos == nullptr) {
    store_query = &plain_query;
    store_key = out.k != nullptr ? static_cast<const Epilogue*>(&plain_key) : &cached_key;
  }
  const StoreLatent key_latent(out.kv.k, true, key.inner_size(), out.slots);
  const StoreLatent value_latent(out.kv.v, false, value.inner_size(), out.slots);
  Branch branches[] = {{&query, store_query, nullptr, nullptr},
                       {&key, store_key, nullptr, nullptr},
                       {&value, &cached_value, nullptr, nullptr}};
  if (out.kv.k.is_latent()) {
    branches[1].latent = &key_latent;
    if (out.k == nullptr) branches[1].epilogue = nullptr;
  }
  if (out.kv.v.is_latent()) branches[2] = {&value, nullptr, nullptr, &value_latent};
  if (query.exchange(ctx.step_kind).after_u == Exchange::kNone) {
    return run_group(ctx, m, input, z, branches);
  }
  for (const Branch& branch : branches) run_group(ctx, m, input, z, std::span(&branch, 1));
}

std::vector<std::int32_t> rotary_row_map(int heads, int head_dim) {
  int half = head_dim / 2;
  std::vector<std::int32_t> map;
  for (int head = 0; head < heads; ++head) {
    for (int pair = 0; pair < half; pair += cpu::kLanes) {
      for (int second = 0; second < 2; ++second) {
        for (int i = 0; i < cpu::kLanes; ++i) {
          bool missing = pair + i >= half;
          map.push_back(missing ? -1 : head * head_dim + second * half + pair + i);
        }
      }
    }
  }
  return map;
}

}  // namespace deinfer

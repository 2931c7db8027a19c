#include "ops/lowrank_linear.h"

#include <algorithm>
#include <limits>

#include "ops/panel_jobs.h"

namespace deinfer {
namespace {

const float* bias_at(const LowRankLinear& linear, int first) {
  return linear.bias.empty() ? nullptr : linear.bias.data() + first;
}

class StoreZ final : public Epilogue {
 public:
  explicit StoreZ(Activations z) : z_(z) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    // Padding columns are stored too: they are exact zeros, which U's padding relies on.
    Activations out = z_.rows_from(row).columns_from(first);
    if (z_.dtype == DType::kFloat32) {
      kernels.store_f32(tile, m, cols, nullptr, out.f32(), z_.ld);
    } else {
      kernels.store_bf16(tile, m, cols, nullptr, out.b16(), z_.ld);
    }
  }

 private:
  Activations z_;
};

class StoreOutput final : public Epilogue {
 public:
  StoreOutput(const LowRankLinear& linear, float* out, std::ptrdiff_t ldo, bool add)
      : linear_(linear), out_(out), ldo_(ldo), add_(add) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_.output_factor().n - first);
    auto store = add_ ? kernels.add_f32 : kernels.store_f32;
    store(tile, m, valid, bias_at(linear_, first), out_ + row * ldo_ + first, ldo_);
  }

 private:
  const LowRankLinear& linear_;
  float* out_;
  std::ptrdiff_t ldo_;
  bool add_;
};

class TakeMaximum final : public Epilogue {
 public:
  TakeMaximum(const LowRankLinear& linear, RowMaximum& maximum)
      : linear_(linear), maximum_(maximum) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    int valid = std::min(cols, linear_.output_factor().n - first);
    kernels.argmax_tile(tile, m, valid, bias_at(linear_, first), first, maximum_.value.data() + row,
                        maximum_.index.data() + row);
  }

 private:
  const LowRankLinear& linear_;
  RowMaximum& maximum_;
};

class StoreGated final : public Epilogue {
 public:
  StoreGated(const LowRankLinear& gate, const LowRankLinear& up, Activations out)
      : gate_(gate), up_(up), out_(out) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float* second, int row, int m,
             int first, int cols) const override {
    int valid = std::min(cols, gate_.output_factor().n - first);
    Activations out = out_.rows_from(row).columns_from(first);
    if (out_.dtype == DType::kFloat32) {
      kernels.silu_mul_f32(tile, second, m, valid, bias_at(gate_, first), bias_at(up_, first),
                           out.f32(), out_.ld);
    } else {
      kernels.silu_mul_bf16(tile, second, m, valid, bias_at(gate_, first), bias_at(up_, first),
                            out.b16(), out_.ld);
    }
  }

 private:
  const LowRankLinear& gate_;
  const LowRankLinear& up_;
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
        half_(out.kv.head_dim / 2),
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
    float* head = out_.q + row * out_.ldq + tile_.head(first) * out_.kv.head_dim;
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
    const KvLayer& kv = out_.kv;
    auto write = kv.dtype == DType::kFloat32 ? kernels.write_k_f32 : kernels.write_k_bf16;
    auto element = static_cast<std::ptrdiff_t>(dtype_size(kv.dtype));
    int head = tile_.head(first);
    tile_.rotate(kernels, tile, row, m, first, [&](const float* half, int count, int d0) {
      for (int i = 0; i < m; ++i) {
        KvSlot slot = out_.slots[static_cast<std::size_t>(row + i)];
        write(half + std::ptrdiff_t{i} * cpu::kPanelRows, count, d0, kv.head_dim, slot.offset,
              kv.k + kv.offset(slot.block, head) * element);
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
    const KvLayer& kv = out_.kv;
    bool f32 = kv.dtype == DType::kFloat32;
    auto write_v = f32 ? kernels.write_v_f32 : kernels.write_v_bf16;
    auto write_k = f32 ? kernels.write_k_f32 : kernels.write_k_bf16;
    auto write = is_key_ ? write_k : write_v;
    std::byte* pool = is_key_ ? kv.k : kv.v;
    auto element = static_cast<std::ptrdiff_t>(dtype_size(kv.dtype));
    int valid = std::min(cols, linear_.output_factor().n - first);
    for (int i = 0; i < m; ++i) {
      float* values = tile + std::ptrdiff_t{i} * cpu::kPanelRows;
      if (!linear_.bias.empty()) {
        for (int j = 0; j < valid; ++j) values[j] += bias_at(linear_, first)[j];
      }
      KvSlot slot = out_.slots[static_cast<std::size_t>(row + i)];
      for (int j = 0; j < valid;) {  // a panel may span heads
        int head = (first + j) / kv.head_dim;
        int d0 = (first + j) % kv.head_dim;
        int count = std::min(valid - j, kv.head_dim - d0);
        write(values + j, count, d0, kv.head_dim, slot.offset,
              pool + kv.offset(slot.block, head) * element);
        j += count;
      }
    }
  }

 private:
  const LowRankLinear& linear_;
  const QkvOutput& out_;
  bool is_key_;
};

/// Collects the jobs of linears that share x; z columns are handed out in order.
class JobList {
 public:
  JobList(const Activations& x, const Activations& z) : x_(x), z_(z) {}

  void add(const LowRankLinear& linear, const Epilogue& epilogue) {
    if (linear.is_low_rank()) {
      Activations z = add_v(linear);
      from_z_[num_from_z_++] = {&linear.u, z, &epilogue, nullptr, {}};
    } else {
      from_x_[num_from_x_++] = {&linear.w, x_, &epilogue, nullptr, {}};
    }
  }

  void add_pair(const LowRankLinear& first, const LowRankLinear& second, const Epilogue& epilogue) {
    Activations first_x = first.is_low_rank() ? add_v(first) : x_;
    Activations second_x = second.is_low_rank() ? add_v(second) : x_;
    PanelJob job{&first.output_factor(), first_x, &epilogue, &second.output_factor(), second_x};
    if (first.is_low_rank() || second.is_low_rank()) {
      from_z_[num_from_z_++] = job;
    } else {
      from_x_[num_from_x_++] = job;
    }
  }

  void run(ExecutionContext& ctx, int m) const {
    run_stages(ctx, m, std::span(from_x_, num_from_x_), std::span(from_z_, num_from_z_));
  }

 private:
  static constexpr std::size_t kMaxLinears = 3;

  Activations add_v(const LowRankLinear& linear) {
    Activations z = z_.columns_from(z_cols_);
    z_cols_ += linear.z_cols();
    store_z_[num_z_] = StoreZ(z);
    from_x_[num_from_x_++] = {&linear.v, x_, &store_z_[num_z_++], nullptr, {}};
    return z;
  }

  Activations x_;
  Activations z_;
  int z_cols_ = 0;
  StoreZ store_z_[kMaxLinears] = {StoreZ({}), StoreZ({}), StoreZ({})};
  PanelJob from_x_[kMaxLinears];
  PanelJob from_z_[kMaxLinears];
  std::size_t num_z_ = 0;
  std::size_t num_from_x_ = 0;
  std::size_t num_from_z_ = 0;
};

void linear_to_f32(ExecutionContext& ctx, int m, const Activations& x, const LowRankLinear& linear,
                   const Activations& z, float* out, std::ptrdiff_t ldo, bool add) {
  StoreOutput epilogue(linear, out, ldo, add);
  JobList jobs(x, z);
  jobs.add(linear, epilogue);
  jobs.run(ctx, m);
}

}  // namespace

void lowrank_linear(ExecutionContext& ctx, int m, const Activations& x, const LowRankLinear& linear,
                    const Activations& z, float* out, std::ptrdiff_t ldo) {
  linear_to_f32(ctx, m, x, linear, z, out, ldo, false);
}

void lowrank_linear_add(ExecutionContext& ctx, int m, const Activations& x,
                        const LowRankLinear& linear, const Activations& z, float* residual,
                        std::ptrdiff_t ldr) {
  linear_to_f32(ctx, m, x, linear, z, residual, ldr, true);
}

void lowrank_argmax(ExecutionContext& ctx, int m, const Activations& x, const LowRankLinear& linear,
                    const Activations& z, std::span<RowMaximum> maxima, int* index) {
  RowMaximum& mine = maxima[static_cast<std::size_t>(ctx.member.id())];
  std::fill_n(mine.value.begin(), m, -std::numeric_limits<float>::infinity());
  std::fill_n(mine.index.begin(), m, 0);
  TakeMaximum epilogue(linear, mine);
  JobList jobs(x, z);
  jobs.add(linear, epilogue);
  jobs.run(ctx, m);
  auto [begin, end] = ctx.member.share(m);
  for (int i = begin; i < end; ++i) {
    auto row = static_cast<std::size_t>(i);
    const RowMaximum* best = &maxima[0];
    for (const RowMaximum& other : maxima) {
      bool equal = other.value[row] == best->value[row];
      bool lower = other.index[row] < best->index[row];
      if (other.value[row] > best->value[row] || (equal && lower)) best = &other;
    }
    index[i] = best->index[row];
  }
  ctx.member.barrier();
}

void lowrank_gated_mlp(ExecutionContext& ctx, int m, const Activations& x,
                       const LowRankLinear& gate, const LowRankLinear& up, const Activations& z,
                       const Activations& out) {
  StoreGated epilogue(gate, up, out);
  JobList jobs(x, z);
  jobs.add_pair(gate, up, epilogue);
  jobs.run(ctx, m);
}

void lowrank_relu(ExecutionContext& ctx, int m, const Activations& x, const LowRankLinear& linear,
                  const Activations& z, const Activations& out) {
  StoreRelu epilogue(linear, out);
  JobList jobs(x, z);
  jobs.add(linear, epilogue);
  jobs.run(ctx, m);
}

void lowrank_qkv(ExecutionContext& ctx, int m, const Activations& x, const LowRankLinear& query,
                 const LowRankLinear& key, const LowRankLinear& value, const Activations& z,
                 const QkvOutput& out) {
  StoreQuery rotated_query(query, out);
  StoreKey rotated_key(key, out);
  StoreOutput plain_query(query, out.q, out.ldq, false);
  StoreOutput plain_key(key, out.k, out.ldk, false);
  StoreCached cached_key(key, out, true);
  StoreCached cached_value(value, out, false);
  JobList jobs(x, z);
  if (out.angles.cos != nullptr) {
    jobs.add(query, rotated_query);
    jobs.add(key, rotated_key);
  } else {
    jobs.add(query, plain_query);
    jobs.add(key, out.k != nullptr ? static_cast<const Epilogue&>(plain_key) : cached_key);
  }
  jobs.add(value, cached_value);
  jobs.run(ctx, m);
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

#include "ops/qk_norm.h"

#include <algorithm>
#include <cmath>

#include "ops/latent_kv.h"

namespace deinfer {
namespace {

/// Heads of a token's q or k under one sum of squares.
struct Unit {
  int row = 0;
  bool is_query = false;
  int first = 0;
  int heads = 0;
};

class Normalizer {
 public:
  Normalizer(ExecutionContext& ctx, const QkNorm& norm, const RotaryAngles& angles,
             const QkvOutput& qkv)
      : ctx_(ctx), norm_(norm), angles_(angles), qkv_(qkv), kernels_(ctx.kernels) {}

  /// Heads by themselves, or whole rows of which this rank has all heads.
  void normalize(int m) {
    const bool full = norm_.kind == QkNormKind::kFull;
    const int query_unit = full ? norm_.own.heads.size() : 1;
    const int key_unit = full ? norm_.own.kv_heads.size() : 1;
    const int query_units = norm_.own.heads.size() / query_unit;
    // Keys are normalised where they are rebuilt, with the factor of a norm over all heads.
    const int key_units = keeps_latents() && !full ? 0 : norm_.own.kv_heads.size() / key_unit;
    const int units = query_units + key_units;
    auto [begin, end] = ctx_.member.share(m * units);
    for (int i = begin; i < end; ++i) {
      const int index = i % units;
      Unit unit{i / units, true, index * query_unit, query_unit};
      if (index >= query_units) {
        unit = {i / units, false, (index - query_units) * key_unit, key_unit};
      }
      float* values = values_of(unit);
      if (!unit.is_query && keeps_latents()) {
        const int width = unit.heads * head_dim();
        const float sum = kernels_.apply_gain_f32(values, norm_.key.gain.data(), width, values);
        store_scale(unit, sum, width);
        continue;
      }
      normalize_row(kernels_, values, unit.heads * head_dim(), norm_of(unit),
                    {values, DType::kFloat32, 0});
      finish(unit);
    }
  }

  /// Rows of which other ranks have some heads.
  void normalize_shared(int first_row, int rows) {
    float* squares = ctx_.floats_to_send();
    // The first rank of those that share a kv head counts it.
    const bool counts_keys =
        norm_.own.heads.begin == norm_.own.kv_heads.begin * (norm_.heads / norm_.kv_heads);
    auto [begin, end] = ctx_.member.share(2 * rows);
    for (int i = begin; i < end; ++i) {
      const Unit unit = row_unit(first_row, i);
      float* values = values_of(unit);
      const float sum = kernels_.apply_gain_f32(values, norm_of(unit).gain.data(),
                                                unit.heads * head_dim(), values);
      squares[i] = unit.is_query || counts_keys ? sum : 0.0f;
    }
    Ticket ticket = ctx_.exchange_floats(Collective::kAllReduce, rows, 2);
    for (int i = begin; i < end; ++i) {
      const Unit unit = row_unit(first_row, i);
      float sum = 0.0f;
      for (int r = 0; r < ctx_.exchange.size(); ++r) sum += ctx_.floats_from(r, ticket)[i];
      const int width = (unit.is_query ? norm_.heads : norm_.kv_heads) * head_dim();
      if (!unit.is_query && keeps_latents()) {
        store_scale(unit, sum, width);
        continue;
      }
      const float mean = sum / static_cast<float>(width);
      kernels_.scale_row(values_of(unit), unit.heads * head_dim(),
                         1.0f / std::sqrt(mean + norm_of(unit).eps));
      finish(unit);
    }
    ctx_.exchange.finish(ctx_.member, ticket);
  }

 private:
  int head_dim() const { return qkv_.head_dim; }
  bool keeps_latents() const { return qkv_.kv.k.is_latent(); }
  void store_scale(const Unit& unit, float sum, int width) const {
    const float mean = sum / static_cast<float>(width);
    store_key_scale(qkv_.kv.k, qkv_.slots[static_cast<std::size_t>(unit.row)],
                    1.0f / std::sqrt(mean + norm_.key.eps));
  }
  /// All q and all k of the tokens in turn.
  Unit row_unit(int first_row, int index) const {
    const bool is_query = index % 2 == 0;
    return {first_row + index / 2, is_query, 0,
            is_query ? norm_.own.heads.size() : norm_.own.kv_heads.size()};
  }
  const Norm& norm_of(const Unit& unit) const { return unit.is_query ? norm_.query : norm_.key; }
  float* values_of(const Unit& unit) const {
    float* row = unit.is_query ? qkv_.q + unit.row * qkv_.ldq : qkv_.k + unit.row * qkv_.ldk;
    return row + std::ptrdiff_t{unit.first} * head_dim();
  }

  /// Rotates the heads of a unit and stores those of k.
  void finish(const Unit& unit) const {
    const KvSide& side = qkv_.kv.k;
    auto write = side.dtype == DType::kFloat32 ? kernels_.write_k_f32 : kernels_.write_k_bf16;
    float* values = values_of(unit);
    for (int head = unit.first; head < unit.first + unit.heads; ++head, values += head_dim()) {
      rotate_head(kernels_, values, head_dim(), angles_.cos + unit.row * angles_.ld,
                  angles_.sin + unit.row * angles_.ld);
      if (unit.is_query) continue;
      KvSlot slot = qkv_.slots[static_cast<std::size_t>(unit.row)];
      if (slot.block < 0) continue;
      write(values, head_dim(), 0, head_dim(), slot.offset, side.at(slot.block, head));
    }
  }

  ExecutionContext& ctx_;
  const QkNorm& norm_;
  const RotaryAngles& angles_;
  const QkvOutput& qkv_;
  const cpu::KernelTable& kernels_;
};

}  // namespace

void rotate_head(const cpu::KernelTable& kernels, float* head, int head_dim, const float* cos,
                 const float* sin) {
  int half = head_dim / 2;
  alignas(64) float tile[cpu::kPanelRows] = {};
  for (int pair = 0; pair < half; pair += cpu::kLanes) {
    int count = std::min(cpu::kLanes, half - pair);
    std::copy_n(head + pair, count, tile);
    std::copy_n(head + half + pair, count, tile + cpu::kLanes);
    kernels.rope_tile(tile, 1, nullptr, cos + pair, sin + pair, 0);
    std::copy_n(tile, count, head + pair);
    std::copy_n(tile + cpu::kLanes, count, head + half + pair);
  }
}

void normalize_qk(ExecutionContext& ctx, int m, const QkNorm& norm, const RotaryAngles& angles,
                  const QkvOutput& qkv) {
  Normalizer normalizer(ctx, norm, angles, qkv);
  if (norm.kind == QkNormKind::kFull && norm.own.heads.size() < norm.heads) {
    for_each_tile(ctx, m, [&](int row, int rows) { normalizer.normalize_shared(row, rows); });
    return;
  }
  normalizer.normalize(m);
  ctx.member.barrier();
}

}  // namespace deinfer

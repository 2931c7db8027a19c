#include "ops/qk_norm.h"

#include <algorithm>

namespace deinfer {
namespace {

/// Rotates one head in place; cos and sin [head_dim / 2], padded to 16.
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

}  // namespace

void normalize_qk(ExecutionContext& ctx, int m, int heads, QkNormKind kind, const Norm& query_norm,
                  const Norm& key_norm, const RotaryAngles& angles, const QkvOutput& qkv) {
  const KvLayer& kv = qkv.kv;
  const cpu::KernelTable& kernels = ctx.kernels;
  auto write = kv.dtype == DType::kFloat32 ? kernels.write_k_f32 : kernels.write_k_bf16;
  auto element = static_cast<std::ptrdiff_t>(dtype_size(kv.dtype));
  // A unit is what one sum of squares covers; those of q come first within a token.
  int query_unit = kind == QkNormKind::kFull ? heads : 1;
  int key_unit = kind == QkNormKind::kFull ? kv.kv_heads : 1;
  int query_units = heads / query_unit;
  int units = query_units + kv.kv_heads / key_unit;
  auto [begin, end] = ctx.member.share(m * units);
  for (int i = begin; i < end; ++i) {
    int row = i / units;
    int unit = i % units;
    bool is_query = unit < query_units;
    int first = is_query ? unit * query_unit : (unit - query_units) * key_unit;
    int count = is_query ? query_unit : key_unit;
    float* values = (is_query ? qkv.q + row * qkv.ldq : qkv.k + row * qkv.ldk) +
                    std::ptrdiff_t{first} * kv.head_dim;
    normalize_row(kernels, values, count * kv.head_dim, is_query ? query_norm : key_norm,
                  {values, DType::kFloat32, 0});
    for (int head = first; head < first + count; ++head, values += kv.head_dim) {
      rotate_head(kernels, values, kv.head_dim, angles.cos + row * angles.ld,
                  angles.sin + row * angles.ld);
      if (is_query) continue;
      KvSlot slot = qkv.slots[static_cast<std::size_t>(row)];
      write(values, kv.head_dim, 0, kv.head_dim, slot.offset,
            kv.k + kv.offset(slot.block, head) * element);
    }
  }
  ctx.member.barrier();
}

}  // namespace deinfer

// Queries and keys that are normalised before the rotation.
#pragma once

#include <cstdint>
#include <span>

#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/lowrank_linear.h"
#include "ops/norm.h"

namespace deinfer {

enum class QkNormKind : std::uint8_t {
  kNone,
  kPerHead,  // every head for itself, weights [head_dim]
  kFull,     // all heads of a token together, weights [heads * head_dim]
};

/// Normalises q[m, heads, head_dim] and k[m, kv_heads, head_dim] (fp32, as lowrank_qkv leaves them,
/// row strides ldq and ldk), rotates both by `angles`, leaves q in place and writes k to the slots
/// of the cache. `kind` is not kNone; head_dim is even.
void normalize_qk(ExecutionContext& ctx, int m, int heads, QkNormKind kind, const Norm& query_norm,
                  const Norm& key_norm, const RotaryAngles& angles, const QkvOutput& qkv);

}  // namespace deinfer

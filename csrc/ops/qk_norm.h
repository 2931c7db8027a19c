// Queries and keys that are normalised before the rotation.
#pragma once

#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/lowrank_linear.h"
#include "ops/norm.h"
#include "plan/norms.h"

namespace deinfer {

/// The norms of q and k, and the heads that they cover.
struct QkNorm {
  QkNormKind kind;  // not kNone
  const Norm& query;
  const Norm& key;
  HeadShare own;  // the heads of this rank, whose weights the norms have
  int heads;      // of all ranks
  int kv_heads;
};

/// Rotates one head in place; cos and sin [head_dim / 2], padded to 16.
void rotate_head(const cpu::KernelTable& kernels, float* head, int head_dim, const float* cos,
                 const float* sin);

/// Normalises q[m, heads, head_dim] and k[m, kv_heads, head_dim] of this rank (fp32, as lowrank_qkv
/// leaves them, row strides ldq and ldk), rotates both by `angles`, leaves q in place and writes k
/// to the slots of the cache. head_dim is even. kFull over heads of several ranks exchanges two
/// numbers per token. Where the cache keeps latents of k, only q is normalised; a norm over all
/// heads of k then leaves its factor there, which takes k as lowrank_qkv leaves it. (Orthonormal
/// factors U of q and k, which a change of basis of the rank dimension could give offline, would
/// make |q| and |k| known from z.)
void normalize_qk(ExecutionContext& ctx, int m, const QkNorm& norm, const RotaryAngles& angles,
                  const QkvOutput& qkv);

}  // namespace deinfer

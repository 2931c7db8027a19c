// Linears whose weight is dense, y = W x + b, or low-rank, y = U (V x) + b, with fused epilogues.
//
// Linears that share their input run as one operation: all V factors (and dense members) in one
// pass over x, one barrier, then all U factors. z = V x is rounded to the activation type once, as
// input of U, and stays in cache: x is taken in tiles of at most kTileTokens tokens.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "ops/batch.h"
#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/linear_group.h"

namespace deinfer {

/// out[m, n] = linear(x[m, k]), fp32, row stride ldo elements; y = soft_cap * tanh(y / soft_cap) of
/// each element where soft_cap is not 0.
void lowrank_linear(ExecutionContext& ctx, int m, const GroupInput& input,
                    const LowRankLinear& linear, const Activations& z, float* out,
                    std::ptrdiff_t ldo, float soft_cap = 0.0f);

/// outs[i][m, n_i] = linears[i](x[m, k]) in the activation type, for up to three linears whose
/// outputs are not exchanged.
void lowrank_linears(ExecutionContext& ctx, int m, const GroupInput& input,
                     std::span<const LowRankLinear> linears, const Activations& z,
                     std::span<const Activations> outs);

/// residual[m, n] += linear(x[m, k]).
void lowrank_linear_add(ExecutionContext& ctx, int m, const GroupInput& input,
                        const LowRankLinear& linear, const Activations& z, float* residual,
                        std::ptrdiff_t ldr);

/// The largest outputs of some rows so far.
struct RowMaximum {
  std::vector<float> value;
  std::vector<int> index;
};

/// value[i] = the largest element of linear(x_i), i in [0, m), and index[i] = its place, the lowest
/// of equal ones (as KernelTable::argmax), without storing the outputs. maxima[threads] holds m
/// rows each; m is at most kTileTokens. soft_cap as in lowrank_linear: it can make elements equal.
void lowrank_argmax(ExecutionContext& ctx, int m, const GroupInput& input,
                    const LowRankLinear& linear, const Activations& z, std::span<RowMaximum> maxima,
                    float* value, int* index, float soft_cap = 0.0f);

/// What a gate passes through before it multiplies.
enum class GateKind : std::uint8_t { kSilu, kGeluTanh };

/// out[m, n] = f(gate(x)) * up(x) in the activation type, f as `kind` says.
void lowrank_gated_mlp(ExecutionContext& ctx, int m, const GroupInput& input,
                       const LowRankLinear& gate, const LowRankLinear& up, GateKind kind,
                       const Activations& z, const Activations& out);

/// out[m, n] = max(linear(x), 0) in the activation type.
void lowrank_relu(ExecutionContext& ctx, int m, const GroupInput& input,
                  const LowRankLinear& linear, const Activations& z, const Activations& out);

/// Rotary angles of a batch: cos, sin [m, ld], column j for the pair j of a head; ld is a multiple
/// of 16.
struct RotaryAngles {
  const float* cos = nullptr;
  const float* sin = nullptr;
  std::ptrdiff_t ld = 0;
};

/// Where q, k and v go. v rows are packed in order; q and k rows by rotary_row_map when there are
/// angles, else in order too. Of a side that keeps latents z is stored instead.
struct QkvOutput {
  float* q = nullptr;  // [m, heads, head_dim]
  std::ptrdiff_t ldq = 0;
  float* k = nullptr;  // [m, kv_heads, head_dim] for k that is not ready for the cache, or null
  std::ptrdiff_t ldk = 0;
  int head_dim = 0;
  KvLayer kv;                     // k, unless it goes to `k`, and v are written to the slots
  std::span<const KvSlot> slots;  // [m]
  RotaryAngles angles;            // of the rotation of q and k; none when cos is null
};

/// q, k, v = linears of x; q and k rotated if there are angles (then `k` is null); k, or what goes
/// to `k`, and v stored. Latents of keys that also go to `k` are stored all the same.
void lowrank_qkv(ExecutionContext& ctx, int m, const GroupInput& input, const LowRankLinear& query,
                 const LowRankLinear& key, const LowRankLinear& value, const Activations& z,
                 const QkvOutput& out);

/// The packed order of q and k rows: a panel of 32 rows holds 16 elements of the first half of one
/// head and their 16 partners in the second half, so that a tile can be rotated where it is
/// computed. Missing rows (head_dim / 2 not a multiple of 16) are -1. head_dim is even.
std::vector<std::int32_t> rotary_row_map(int heads, int head_dim);

}  // namespace deinfer

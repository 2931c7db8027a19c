// Normalisation of token rows.
#pragma once

#include <span>
#include <vector>

#include "ops/context.h"
#include "plan/norms.h"
#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// A normalisation and its weights [n].
struct Norm {
  NormKind kind = NormKind::kNone;
  float eps = 0.0f;
  std::vector<float> gain;  // empty for kNone
  std::vector<float> bias;  // of kLayer

  std::size_t bytes() const { return (gain.size() + bias.size()) * sizeof(float); }
};

/// y[i] = norm(x_i) in the activation type, where x_i is row i of x[m, n] (fp32, row stride ldx),
/// or row rows[i] when `rows` is given. Returns where this thread finds y[m, n]: `out`, shared by
/// the team, or with few rows its own copy in the scratch memory, valid until its next normalize().
Activations normalize(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
                      const Norm& norm, const Activations& out, const int* rows = nullptr);

/// The rows [begin, end) of that, by the calling thread alone.
void normalize_rows(ExecutionContext& ctx, int begin, int end, int n, const float* x,
                    std::ptrdiff_t ldx, const Norm& norm, const Activations& out,
                    const int* rows = nullptr);

/// Row x[n] of one thread; out may be x.
void normalize_row(const cpu::KernelTable& kernels, const float* x, int n, const Norm& norm,
                   const Activations& out);

/// A norm of a row as y = (x - mean) * scale * gain + bias.
struct RowStatistics {
  float mean = 0.0f;  // 0 for kRms
  float scale = 1.0f;
};

/// Of a whole row of which rank i has the columns shares[i], the last of them up to its end, from
/// their statistics_columns(norm.kind) numbers at parts[i].
RowStatistics combine_statistics(const Norm& norm, std::span<const Range> shares,
                                 const float* const* parts);

}  // namespace deinfer

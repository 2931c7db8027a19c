// Normalisation of token rows.
#pragma once

#include "ops/context.h"

namespace deinfer {

/// y[i] = x_i / sqrt(mean(x_i^2) + eps) * gain in the activation type, where x_i is row i of
/// x[m, n] (fp32, row stride ldx), or row rows[i] when `rows` is given.
/// Returns where this thread finds y[m, n]: `out`, shared by the team, or with few rows its own
/// copy in the scratch memory, valid until its next rms_norm().
Activations rms_norm(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
                     const float* gain, float eps, const Activations& out,
                     const int* rows = nullptr);

/// The rows [begin, end) of that, by the calling thread alone.
void rms_norm_rows(ExecutionContext& ctx, int begin, int end, int n, const float* x,
                   std::ptrdiff_t ldx, const float* gain, float eps, const Activations& out,
                   const int* rows = nullptr);

}  // namespace deinfer

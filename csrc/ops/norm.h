// Normalisation of token rows.
#pragma once

#include "ops/context.h"

namespace deinfer {

/// out[i] = x_i / sqrt(mean(x_i^2) + eps) * gain in the activation type, where x_i is row i of
/// x[m, n] (fp32, row stride ldx), or row rows[i] when `rows` is given.
void rms_norm(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
              const float* gain, float eps, const Activations& out, const int* rows = nullptr);

}  // namespace deinfer

// Normalisation of token rows.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/context.h"

namespace deinfer {

enum class NormKind : std::uint8_t {
  kNone,   // y = x
  kRms,    // y = x / sqrt(mean(x^2) + eps) * gain
  kLayer,  // y = (x - mean(x)) / sqrt(variance(x) + eps) * gain + bias
};

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

/// residual[m, n] += norm(x[m, n]), row strides ldx and ldr; x is overwritten.
void normalize_add(ExecutionContext& ctx, int m, int n, float* x, std::ptrdiff_t ldx,
                   const Norm& norm, float* residual, std::ptrdiff_t ldr);

/// Row x[n] of one thread; out may be x.
void normalize_row(const cpu::KernelTable& kernels, const float* x, int n, const Norm& norm,
                   const Activations& out);

}  // namespace deinfer

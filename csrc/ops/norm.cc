#include "ops/norm.h"

#include <cmath>

namespace deinfer {

void normalize_rows(ExecutionContext& ctx, int begin, int end, int n, const float* x,
                    std::ptrdiff_t ldx, const Norm& norm, const Activations& out, const int* rows) {
  for (int i = begin; i < end; ++i) {
    const float* source = x + (rows == nullptr ? i : rows[i]) * ldx;
    normalize_row(ctx.kernels, source, n, norm, out.rows_from(i));
  }
}

void normalize_row(const cpu::KernelTable& kernels, const float* x, int n, const Norm& norm,
                   const Activations& out) {
  const float* gain = norm.gain.data();
  bool f32 = out.dtype == DType::kFloat32;
  switch (norm.kind) {
    case NormKind::kNone:
      f32 ? kernels.copy_row_f32(x, n, out.f32()) : kernels.copy_row_bf16(x, n, out.b16());
      break;
    case NormKind::kRms:
      f32 ? kernels.rms_norm_f32(x, gain, n, norm.eps, out.f32())
          : kernels.rms_norm_bf16(x, gain, n, norm.eps, out.b16());
      break;
    case NormKind::kLayer:
      f32 ? kernels.layer_norm_f32(x, gain, norm.bias.data(), n, norm.eps, out.f32())
          : kernels.layer_norm_bf16(x, gain, norm.bias.data(), n, norm.eps, out.b16());
      break;
  }
}

Activations normalize(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
                      const Norm& norm, const Activations& out, const int* rows) {
  if (m <= ctx.scratch.normed_rows) {  // cheaper than a barrier
    Activations own = ctx.scratch.normed.view();
    normalize_rows(ctx, 0, m, n, x, ldx, norm, own, rows);
    return own;
  }
  auto [begin, end] = ctx.member.share(m);
  normalize_rows(ctx, begin, end, n, x, ldx, norm, out, rows);
  ctx.member.barrier();
  return out;
}

RowStatistics combine_statistics(const Norm& norm, std::span<const Range> shares,
                                 const float* const* parts) {
  const auto width = static_cast<float>(shares.back().end);
  RowStatistics row;
  float squares = 0.0f;
  if (norm.kind == NormKind::kLayer) {
    // Chan, Golub, LeVeque 1979: distances to the mean of all, from those to the parts' means.
    for (std::size_t i = 0; i < shares.size(); ++i) {
      row.mean += static_cast<float>(shares[i].size()) * parts[i][0];
    }
    row.mean /= width;
    for (std::size_t i = 0; i < shares.size(); ++i) {
      const float shift = parts[i][0] - row.mean;
      squares += parts[i][1] + static_cast<float>(shares[i].size()) * shift * shift;
    }
  } else {
    for (std::size_t i = 0; i < shares.size(); ++i) squares += parts[i][0];
  }
  row.scale = 1.0f / std::sqrt(squares / width + norm.eps);
  return row;
}

}  // namespace deinfer

#include "ops/norm.h"

namespace deinfer {
namespace {

void normalize_rows(ExecutionContext& ctx, int begin, int end, int n, const float* x,
                    std::ptrdiff_t ldx, const Norm& norm, const Activations& out, const int* rows) {
  for (int i = begin; i < end; ++i) {
    const float* source = x + (rows == nullptr ? i : rows[i]) * ldx;
    normalize_row(ctx.kernels, source, n, norm, out.rows_from(i));
  }
}

}  // namespace

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

void normalize_add(ExecutionContext& ctx, int m, int n, float* x, std::ptrdiff_t ldx,
                   const Norm& norm, float* residual, std::ptrdiff_t ldr) {
  auto [begin, end] = ctx.member.share(m);
  for (int i = begin; i < end; ++i) {
    float* row = x + i * ldx;
    normalize_row(ctx.kernels, row, n, norm, {row, DType::kFloat32, ldx});
    ctx.kernels.add_row(row, n, residual + i * ldr);
  }
  ctx.member.barrier();
}

}  // namespace deinfer

#include "ops/norm.h"

namespace deinfer {

void rms_norm_rows(ExecutionContext& ctx, int begin, int end, int n, const float* x,
                   std::ptrdiff_t ldx, const float* gain, float eps, const Activations& out,
                   const int* rows) {
  for (int i = begin; i < end; ++i) {
    const float* source = x + (rows == nullptr ? i : rows[i]) * ldx;
    Activations row = out.rows_from(i);
    if (out.dtype == DType::kFloat32) {
      ctx.kernels.rms_norm_f32(source, gain, n, eps, row.f32());
    } else {
      ctx.kernels.rms_norm_bf16(source, gain, n, eps, row.b16());
    }
  }
}

Activations rms_norm(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
                     const float* gain, float eps, const Activations& out, const int* rows) {
  if (m <= ctx.scratch.normed_rows) {  // cheaper than a barrier
    Activations own = ctx.scratch.normed.view();
    rms_norm_rows(ctx, 0, m, n, x, ldx, gain, eps, own, rows);
    return own;
  }
  auto [begin, end] = ctx.member.share(m);
  rms_norm_rows(ctx, begin, end, n, x, ldx, gain, eps, out, rows);
  ctx.member.barrier();
  return out;
}

}  // namespace deinfer

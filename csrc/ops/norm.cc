#include "ops/norm.h"

namespace deinfer {

void rms_norm(ExecutionContext& ctx, int m, int n, const float* x, std::ptrdiff_t ldx,
              const float* gain, float eps, const Activations& out, const int* rows) {
  auto [begin, end] = ctx.member.share(m);
  for (int i = begin; i < end; ++i) {
    const float* source = x + (rows == nullptr ? i : rows[i]) * ldx;
    Activations row = out.rows_from(i);
    if (out.dtype == DType::kFloat32) {
      ctx.kernels.rms_norm_f32(source, gain, n, eps, row.f32());
    } else {
      ctx.kernels.rms_norm_bf16(source, gain, n, eps, row.b16());
    }
  }
  ctx.member.barrier();
}

}  // namespace deinfer

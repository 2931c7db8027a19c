// Kernels for AVX-512 with the BF16 extension, and the table of AMX-BF16, which shares all but
// the products of bf16 and int8.
#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_avx512_bf16.h"
#include "kernels/cpu/table_impl.h"
// clang-format on

namespace deinfer::cpu {

namespace {

inline constexpr int kExpandedSteps = 256;  // pairs of k: 32 KiB of bf16 weights

/// int8 weights by AMX tiles, part by part of k, as tiles are loaded from memory only.
template <bool kAdd>
void amx_panel_gemm_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                         const float* scale, int k_pad, const void*, float* c) {
  constexpr std::ptrdiff_t kWeights = kStepWeights<DotBf16, kPanelHalves>;
  alignas(64) bf16 expanded[kExpandedSteps * kWeights];
  const int steps = k_pad / DotBf16::kElements;
  for (int step = 0; step < steps; step += kExpandedSteps) {
    const int count = steps - step < kExpandedSteps ? steps - step : kExpandedSteps;
    const auto* w = panel + step * kWeights;
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(w + i * kWeights + kPrefetchAhead, 0, 2);
      expand_int8(w + i * kWeights, expanded + i * kWeights);
    }
    auto* gemm = kAdd || step > 0 ? amx_panel_gemm_add_bf16 : amx_panel_gemm_bf16;
    gemm(x + std::ptrdiff_t{step} * DotBf16::kElements, ldx, m, expanded, kPanelRows,
         count * DotBf16::kElements, nullptr, c);
  }
  if (scale != nullptr) scale_columns(scale, m, c);
}

constexpr KernelTable make_amx_table() {
  KernelTable table = make_table(Isa::kAmxBf16);
  table.panel_gemm_bf16 = amx_panel_gemm_bf16;
  table.panel_gemm_add_bf16 = amx_panel_gemm_add_bf16;
  table.panel_gemm_int8 = amx_panel_gemm_int8<false>;
  table.panel_gemm_add_int8 = amx_panel_gemm_int8<true>;
  table.part_tokens = 128;
  return table;
}

}  // namespace

constinit const KernelTable kAvx512Bf16Kernels = make_table(Isa::kAvx512Bf16);
constinit const KernelTable kAmxBf16Kernels = make_amx_table();

}  // namespace deinfer::cpu

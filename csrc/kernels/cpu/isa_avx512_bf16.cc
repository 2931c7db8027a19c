// Kernels for AVX-512 with the BF16 extension, and the table of AMX-BF16, which shares all but
// the products of bf16 and int8.
#include <limits>

#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_avx512_bf16.h"
#include "kernels/cpu/table_impl.h"
#include "kernels/cpu/compressed_impl.h"
// clang-format on

namespace deinfer::cpu {

namespace {

template <auto kProduct>
void amx_scaled_product(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                        const float* scale, int k_pad, const void*, float* c) {
  kProduct(x, ldx, m, panel, k_pad, c);
  if (scale != nullptr) scale_columns(scale, m, c);
}

constexpr KernelTable make_bf16_table() {
  KernelTable table = make_table(Isa::kAvx512Bf16);
  table.compressed_tokens = std::numeric_limits<int>::max();  // costs some per cent from 8 on
  table.panel_gemm_compressed = panel_gemm_compressed;
  return table;
}

constexpr KernelTable make_amx_table() {
  KernelTable table = make_table(Isa::kAmxBf16);
  table.panel_gemm_bf16 = amx_panel_gemm_bf16;
  table.panel_gemm_add_bf16 = amx_panel_gemm_add_bf16;
  table.panel_gemm_int8 = amx_scaled_product<cpu::amx_panel_gemm_int8>;
  table.panel_gemm_add_int8 = amx_scaled_product<cpu::amx_panel_gemm_add_int8>;
  table.part_tokens = 128;
  return table;
}

}  // namespace

constinit const KernelTable kAvx512Bf16Kernels = make_bf16_table();
constinit const KernelTable kAmxBf16Kernels = make_amx_table();

}  // namespace deinfer::cpu

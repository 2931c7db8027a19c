// Kernels for AVX2 with FMA.
#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_avx2.h"
#include "kernels/cpu/table_impl.h"
#include "kernels/cpu/avx2_weights_impl.h"
// clang-format on

namespace deinfer::cpu {

namespace {

constexpr KernelTable make_avx2_table() {
  KernelTable table = with_expanded(make_table(Isa::kAvx2), panel_gemm_visited_int8);
  table.compressed_tokens = kVisitTokens;
  table.panel_gemm_compressed = panel_gemm_compressed;
  table.panel_gemm_expanded_compressed = panel_gemm_expanded_compressed;
  return table;
}

}  // namespace

constinit const KernelTable kAvx2Kernels = make_avx2_table();

}  // namespace deinfer::cpu

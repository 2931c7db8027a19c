// Kernels for AVX2 with FMA.
#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_avx2.h"
#include "kernels/cpu/table_impl.h"
// clang-format on

namespace deinfer::cpu {

constinit const KernelTable kAvx2Kernels = make_table(Isa::kAvx2);

}  // namespace deinfer::cpu

// Kernels for AVX-512 without the BF16 extension.
#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_avx512_fma.h"
#include "kernels/cpu/table_impl.h"
// clang-format on

namespace deinfer::cpu {

constinit const KernelTable kAvx512Kernels = make_table(Isa::kAvx512);

}  // namespace deinfer::cpu

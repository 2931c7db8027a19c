// Kernels for any CPU: plain C++.
#include "kernels/cpu/isa_tables.h"
// clang-format off: the vectors come before the kernels
#include "kernels/cpu/simd_scalar.h"
#include "kernels/cpu/table_impl.h"
#include "kernels/cpu/expanded_impl.h"
// clang-format on

namespace deinfer::cpu {

constinit const KernelTable kScalarKernels =
    with_expanded(make_table(Isa::kScalar), panel_gemm_expanded_int8);

}  // namespace deinfer::cpu

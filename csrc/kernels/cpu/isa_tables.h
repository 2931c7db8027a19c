// The table of each instruction set; constants, so that nothing runs before dispatch.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;

}  // namespace deinfer::cpu

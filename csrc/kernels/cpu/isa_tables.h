// The table of each instruction set; constants, so that nothing runs before dispatch.
#pragma once

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxBf16Kernels;  // the AVX-512-BF16 ones with the product below

/// panel_gemm_bf16 and panel_gemm_add_bf16 by AMX tiles (isa_amx_bf16.cc), and those of int8
/// without their scales.
void amx_panel_gemm_bf16(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                         int k_pad, const void* next, float* c);
void amx_panel_gemm_add_bf16(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                             int k_pad, const void* next, float* c);
void amx_panel_gemm_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                         int k_pad, float* c);
void amx_panel_gemm_add_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                             int k_pad, float* c);

}  // namespace deinfer::cpu

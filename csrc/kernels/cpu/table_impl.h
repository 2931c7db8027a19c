// The kernel table of the instruction set whose simd_*.h was included before this header.
#pragma once

// clang-format off: each header needs those above it
#include "kernels/cpu/math_impl.h"
#include "kernels/cpu/gemm_impl.h"
#include "kernels/cpu/epilogue_impl.h"
#include "kernels/cpu/rows_impl.h"
#include "kernels/cpu/exchange_impl.h"
#include "kernels/cpu/attention_tile_impl.h"
#include "kernels/cpu/attention_impl.h"
// clang-format on

namespace deinfer::cpu {
namespace {

constexpr KernelTable make_table(Isa isa) {
  return {
      .isa = isa,
      .part_tokens = 64,
      .compressed_tokens = 0,
      .panel_gemm_f32 = panel_gemm<DotF32>,
      .panel_gemm_bf16 = panel_gemm<DotBf16>,
      .panel_gemm_int8 = panel_gemm_int8<>,
      .panel_gemm_add_f32 = panel_gemm<DotF32, true>,
      .panel_gemm_add_bf16 = panel_gemm<DotBf16, true>,
      .panel_gemm_add_int8 = panel_gemm_int8<true>,
      .panel_gemm_compressed = nullptr,
      .expand_inputs = nullptr,
      .expanded_inputs_size = nullptr,
      .panel_gemm_expanded_bf16 = nullptr,
      .panel_gemm_expanded_int8 = nullptr,
      .panel_gemm_expanded_compressed = nullptr,
      .store_f32 = store_tile<float>,
      .store_bf16 = store_tile<bf16>,
      .add_f32 = add_tile,
      .silu_mul_f32 = gated_mul<silu, float>,
      .silu_mul_bf16 = gated_mul<silu, bf16>,
      .gelu_tanh_mul_f32 = gated_mul<gelu_tanh, float>,
      .gelu_tanh_mul_bf16 = gated_mul<gelu_tanh, bf16>,
      .relu_f32 = relu<float>,
      .relu_bf16 = relu<bf16>,
      .rope_tile = rope_tile,
      .argmax_tile = argmax_tile,
      .write_k_f32 = write_k<float>,
      .write_k_bf16 = write_k<bf16>,
      .write_v_f32 = write_v<float>,
      .write_v_bf16 = write_v<bf16>,
      .attention_scratch = attention_scratch,
      .attention_split_f32 = attention_split<float>,
      .attention_split_bf16 = attention_split<bf16>,
      .attention_merge = attention_merge,
      .attention_finish_f32 = attention_finish<float>,
      .attention_finish_bf16 = attention_finish<bf16>,
      .rms_norm_f32 = rms_norm<float>,
      .rms_norm_bf16 = rms_norm<bf16>,
      .layer_norm_f32 = layer_norm<float>,
      .layer_norm_bf16 = layer_norm<bf16>,
      .copy_row_f32 = copy_row<float>,
      .copy_row_bf16 = copy_row<bf16>,
      .add_row = add_row,
      .scale_row = scale_row,
      .soft_cap = soft_cap,
      .argmax = argmax,
      .group_maxima = group_maxima,
      .select = select,
      .exp_blocks = exp_blocks,
      .sum_parts_f32 = sum_parts<float>,
      .sum_parts_bf16 = sum_parts<bf16>,
      .sum_centered_parts_f32 = sum_centered_parts<float>,
      .sum_centered_parts_bf16 = sum_centered_parts<bf16>,
      .apply_gain_f32 = apply_gain<float>,
      .apply_gain_bf16 = apply_gain<bf16>,
      .center_row_f32 = center_row<float>,
      .center_row_bf16 = center_row<bf16>,
  };
}

}  // namespace
}  // namespace deinfer::cpu

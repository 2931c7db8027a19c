// The CPU kernels of one instruction set: raw pointers and sizes, no policy, no allocation.
//
// Conventions. m tokens, k inputs, n outputs. A vector is kLanes floats in every instruction set.
// Every result of a token is computed by the same operations in the same order whatever else is in
// the call (batch invariance): one accumulator per output over all of k, fixed tiles of KV
// positions, explicit fused multiply-adds only (built with -ffp-contract=off).
//
// Packed weights. W[n, k] is stored as panels of 32 (or 16) consecutive rows, of which the last may
// have fewer, one contiguous stream:
//   bf16: [panel][k_pad/2][rows][2]     fp32: [panel][k_pad][rows]
//   int8: [panel][k_pad/2][4][2][4][2], byte (l, h, i, e) = row 16 h + 4 l + i, element e of a pair
// n is padded to 8 (int8: 32) and k to 2 with zeros (kernels/cpu/packing.h). An int8 weight is
// q * scale[row] with q in [-127, 127] stored as magnitude and sign (bit 7): both orders are what
// one table look-up and an unpack turn into two vectors of bf16 pairs.
//
// KV cache of one layer. K: [block][head][block_size/16][dim][16 tokens], so that a vector holds
// the same element of 16 consecutive tokens; V: [block][head][block_size][dim].
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bf16.h"
#include "base/cpu_features.h"

namespace deinfer::cpu {

inline constexpr int kLanes = 16;
inline constexpr int kHalfLanes = kLanes / 2;
inline constexpr int kPanelRows = 32;
/// KV positions that share one step of the online softmax; tiles are aligned to it.
inline constexpr int kKvTile = 64;
/// KV positions after which the softmax state starts afresh; partial states merge in ascending
/// order, so that splits may be computed by different threads with the same bits.
inline constexpr int kKvSplit = 256;
/// Elements of a row whose largest ones group_maxima writes as kLanes numbers.
inline constexpr int kMaximaSpan = 1024;
/// Elements of a row that share one sum in exp_blocks.
inline constexpr int kSumBlock = 256;
/// Rows (query tokens x heads) that one attention call may hold.
inline constexpr int kMaxAttentionRows = 64;

/// The tokens of a sequence of which one of `size` ranks keeps the KV: of every size * run
/// consecutive ones the rank-th `run`. What it keeps is numbered without gaps. (Always inlined:
/// code of one instruction set must not be linked into that of others.)
struct TokenShare {
  int rank = 0;
  int size = 1;
  int run = 1;

  /// How many of the first `position` tokens it keeps.
  [[gnu::always_inline]] constexpr int before(int position) const {
    if (size == 1) return position;
    const int rest = position % (size * run) - rank * run;
    return position / (size * run) * run + (rest < 0 ? 0 : rest < run ? rest : run);
  }
  /// The position of what it keeps as number `index`.
  [[gnu::always_inline]] constexpr int position(int index) const {
    return size == 1 ? index : (index / run * size + rank) * run + index % run;
  }
  bool operator==(const TokenShare&) const = default;
};

/// K or V of one layer as the attention kernels read it, paged in the layouts above.
struct KvSideView {
  const void* data = nullptr;                 // of head 0 in block 0; float or bf16
  std::ptrdiff_t block_stride = 0;            // elements from one block to the next
  std::ptrdiff_t head_stride = 0;             // elements from one head to the next
  const std::int32_t* block_table = nullptr;  // of the blocks from first_position on
  int first_position = 0;                     // a multiple of kKvTile
  int block_size = 0;                         // tokens, a multiple of 16
  int dim = 0;                                // elements of a head, any positive number
  int group = 0;                              // consecutive heads of the query that share a head
};

struct KvView {
  KvSideView k;
  KvSideView v;
};

/// The queries of one attention call: rows = tokens x heads, row (i, h) at
/// q + i * token_stride + h * k.dim. Token i stands at position first_position + i and sees
/// the positions [max(0, its position - window + 1), its position]; window 0 means all. Of these
/// the KV has those of `share`, under their numbers there. Scores are s = scale q . k, or
/// soft_cap * tanh(s / soft_cap) where soft_cap is not 0.
struct QueryView {
  const float* q = nullptr;
  std::ptrdiff_t token_stride = 0;
  int tokens = 0;
  int heads = 0;
  int first_position = 0;
  int window = 0;
  float scale = 1.0f;
  float soft_cap = 0.0f;
  TokenShare share = {};
};

/// Softmax state of rows: running maximum, sum of exponentials and unnormalised output.
struct AttentionState {
  float* maximum = nullptr;  // [rows]
  float* sum = nullptr;      // [rows]
  float* output = nullptr;   // [rows, v.dim]
};

/// What the elements that `select` takes are to its bound; NaN is nothing to any bound.
enum class Compare { kAbove, kAtLeast, kBelow };

/// LayerNorm completed after a product whose input was divided by columns:
/// out[i, j] = scale[i] * (sum over p of parts[p][i, j] + shifts[i, p] * gain[p, j]) + bias[j].
struct Centering {
  const float* scale = nullptr;
  const float* shifts = nullptr;  // [rows, num_parts]
  const float* gain = nullptr;    // [num_parts, cols], rows ld apart
  std::ptrdiff_t ld = 0;
  const float* bias = nullptr;
};

struct KernelTable {
  Isa isa;
  /// Tokens from which on a thread had better take tokens of its own, with all weights, than share
  /// them: their product takes several times as long as reading the weights from memory.
  int part_tokens;

  /// In steps of up to so many tokens compressed weights save time, in larger ones they may cost
  /// much; 0 where panel_gemm_compressed is null.
  int compressed_tokens;

  // --- matrix products -------------------------------------------------------------------------
  /// c[m, kPanelRows] = x[m, k_pad] . panel^T for one panel of `rows` (8, 16, 24 or 32) rows. x
  /// rows are ldx elements apart and zero beyond k. `next` (may be null) is memory read soon after,
  /// for prefetching. c is 64-byte aligned; its columns from `rows` on are left alone.
  void (*panel_gemm_f32)(const float* x, std::ptrdiff_t ldx, int m, const float* panel, int rows,
                         int k_pad, const void* next, float* c);
  /// The same for bf16 x and weights with fp32 accumulation: for each pair of k the odd element is
  /// added first, then the even one (the order of vdpbf16ps); AMX has an order of its own, see
  /// amx_gemm_impl.h.
  void (*panel_gemm_bf16)(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                          int k_pad, const void* next, float* c);

  /// The same for int8 weights in panels of 32 rows and bf16 x: the bf16 products of q, times
  /// scale[32], which may be null for 1.
  void (*panel_gemm_int8)(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                          const float* scale, int k_pad, const void* next, float* c);

  /// The same on top of c[m, kPanelRows], for a product whose k comes in parts: products of
  /// consecutive parts, each a multiple of 32 but for the last, end with the bits of one product
  /// over all of k. int8: c holds sums without the scale, which the last part is given.
  void (*panel_gemm_add_f32)(const float* x, std::ptrdiff_t ldx, int m, const float* panel,
                             int rows, int k_pad, const void* next, float* c);
  void (*panel_gemm_add_bf16)(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                              int k_pad, const void* next, float* c);
  void (*panel_gemm_add_int8)(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                              const float* scale, int k_pad, const void* next, float* c);

  /// The product of the columns [k_begin, k_end) of a compressed panel (compressed_panel.h) of 32
  /// rows and k_pad columns, from zero where k_begin is 0, else on top of c; x begins at column
  /// k_begin. Both are multiples of 32 but for k_end = k_pad. Has the bits of panel_gemm_bf16. Null
  /// where expanding the weights would take longer than it saves, or was not built.
  void (*panel_gemm_compressed)(const bf16* x, std::ptrdiff_t ldx, int m, const std::byte* panel,
                                int k_pad, int k_begin, int k_end, const void* next, float* c);

  /// The following have the bits of the products of bf16 x above and are faster where bf16 is
  /// multiplied as fp32: there x is better widened once for all panels. Null elsewhere.
  /// x[m, k] as they read it: out[expanded_inputs_size(m, k)], 64-byte aligned. k is even.
  void (*expand_inputs)(const bf16* x, std::ptrdiff_t ldx, int m, int k, float* out);
  std::ptrdiff_t (*expanded_inputs_size)(int m, int k);
  /// From zero, or with `add` on top of c.
  void (*panel_gemm_expanded_bf16)(const float* x, int m, const bf16* panel, int rows, int k_pad,
                                   const void* next, bool add, float* c);
  void (*panel_gemm_expanded_int8)(const float* x, int m, const std::int8_t* panel,
                                   const float* scale, int k_pad, const void* next, bool add,
                                   float* c);
  /// From zero where k_begin is 0, else on top of c. Null where panel_gemm_compressed is.
  void (*panel_gemm_expanded_compressed)(const float* x, int m, const std::byte* panel, int k_pad,
                                         int k_begin, int k_end, const void* next, float* c);

  // --- epilogues: tiles c[m, kPanelRows] to rows of memory ---------------------------------------
  // cols in [1, 32] columns are written. bias[cols] may be null.
  void (*store_f32)(const float* c, int m, int cols, const float* bias, float* out,
                    std::ptrdiff_t ldo);
  void (*store_bf16)(const float* c, int m, int cols, const float* bias, bf16* out,
                     std::ptrdiff_t ldo);
  /// out += c + bias (the residual stream).
  void (*add_f32)(const float* c, int m, int cols, const float* bias, float* out,
                  std::ptrdiff_t ldo);
  /// out = silu(gate + gate_bias) * (up + up_bias); gate and up are tiles. out is not an alias.
  void (*silu_mul_f32)(const float* gate, const float* up, int m, int cols, const float* gate_bias,
                       const float* up_bias, float* out, std::ptrdiff_t ldo);
  void (*silu_mul_bf16)(const float* gate, const float* up, int m, int cols, const float* gate_bias,
                        const float* up_bias, bf16* out, std::ptrdiff_t ldo);
  /// The same with gelu in its tanh form: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
  void (*gelu_tanh_mul_f32)(const float* gate, const float* up, int m, int cols,
                            const float* gate_bias, const float* up_bias, float* out,
                            std::ptrdiff_t ldo);
  void (*gelu_tanh_mul_bf16)(const float* gate, const float* up, int m, int cols,
                             const float* gate_bias, const float* up_bias, bf16* out,
                             std::ptrdiff_t ldo);
  /// out = max(c + bias, 0); NaN stays NaN.
  void (*relu_f32)(const float* c, int m, int cols, const float* bias, float* out,
                   std::ptrdiff_t ldo);
  void (*relu_bf16)(const float* c, int m, int cols, const float* bias, bf16* out,
                    std::ptrdiff_t ldo);
  /// Rotates the pairs (c[i, j], c[i, 16 + j]) of a tile in place, j in [0, 16):
  /// (a, b) -> (a cos - b sin, b cos + a sin) with cos, sin [m, 16] rows ld apart. bias[32] is
  /// added before (may be null).
  void (*rope_tile)(float* c, int m, const float* bias, const float* cos, const float* sin,
                    std::ptrdiff_t ld);

  /// Takes the tile of columns [first, first + cols) into the running maximum of each of m rows:
  /// best[i] and index[i] change when an element is larger (NaN never is), or as large and its
  /// column lower; tiles may come in any order.
  void (*argmax_tile)(const float* c, int m, int cols, const float* bias, int first, float* best,
                      int* index);

  // --- KV cache ----------------------------------------------------------------------------------
  // Writes `cols` consecutive elements (head dimensions d0 .. d0 + cols) of one token's K or V.
  // block points at the kv head within the token's block, offset is the token's place in it.
  void (*write_k_f32)(const float* values, int cols, int d0, int head_dim, int offset, void* block);
  void (*write_k_bf16)(const float* values, int cols, int d0, int head_dim, int offset,
                       void* block);
  void (*write_v_f32)(const float* values, int cols, int d0, int head_dim, int offset, void* block);
  void (*write_v_bf16)(const float* values, int cols, int d0, int head_dim, int offset,
                       void* block);

  // --- attention
  // -----------------------------------------------------------------------------------
  /// Floats of scratch (64-byte aligned) that attention_split needs for `rows` rows.
  std::size_t (*attention_scratch)(int rows, int k_dim);
  /// The state of all rows over the KV positions [split * kKvSplit, (split + 1) * kKvSplit),
  /// numbered as in QueryView::share: each row's own visible part of them. A row that sees nothing
  /// there gets (-inf, 0, 0).
  void (*attention_split_f32)(const QueryView& query, const KvView& kv, int split, float* scratch,
                              const AttentionState& state);
  void (*attention_split_bf16)(const QueryView& query, const KvView& kv, int split, float* scratch,
                               const AttentionState& state);
  /// into = into combined with from, over the same rows. A side whose sum is 0 is empty and leaves
  /// the bits of the other.
  void (*attention_merge)(const AttentionState& from, int rows, int v_dim,
                          const AttentionState& into);
  /// out row (i, h) at out + i * token_stride + h * head_stride = output / sum.
  void (*attention_finish_f32)(const AttentionState& state, int tokens, int heads, int v_dim,
                               float* out, std::ptrdiff_t token_stride, std::ptrdiff_t head_stride);
  void (*attention_finish_bf16)(const AttentionState& state, int tokens, int heads, int v_dim,
                                bf16* out, std::ptrdiff_t token_stride, std::ptrdiff_t head_stride);

  // --- rows
  // ----------------------------------------------------------------------------------------
  /// out[j] = x[j] / sqrt(mean(x^2) + eps) * gain[j] for one row of n. out may be x.
  void (*rms_norm_f32)(const float* x, const float* gain, int n, float eps, float* out);
  void (*rms_norm_bf16)(const float* x, const float* gain, int n, float eps, bf16* out);
  /// out[j] = (x[j] - mean(x)) / sqrt(variance(x) + eps) * gain[j] + bias[j] for one row of n,
  /// where the variance is the mean of the squared distances to the mean. out may be x.
  void (*layer_norm_f32)(const float* x, const float* gain, const float* bias, int n, float eps,
                         float* out);
  void (*layer_norm_bf16)(const float* x, const float* gain, const float* bias, int n, float eps,
                          bf16* out);
  /// out[j] = x[j] for one row of n.
  void (*copy_row_f32)(const float* x, int n, float* out);
  void (*copy_row_bf16)(const float* x, int n, bf16* out);
  /// out[j] += x[j] for one row of n.
  void (*add_row)(const float* x, int n, float* out);
  /// x[j] *= scale for one row of n.
  void (*scale_row)(float* x, int n, float scale);
  /// x[j] = cap * tanh(x[j] / cap) for one row of n.
  void (*soft_cap)(float* x, int n, float cap);
  /// Largest element of x[n] and the lowest index that has it; NaN counts as -inf. n >= 1. When
  /// nothing is larger than -inf the index is 0.
  void (*argmax)(const float* x, int n, float* value, int* index);
  /// Divides x[n] into disjoint groups and writes the largest element of each to
  /// maxima[ceil(n / kMaximaSpan) * kLanes]; NaN counts as -inf, an empty group has -inf.
  void (*group_maxima)(const float* x, int n, float* maxima);
  /// Moves the elements of x[n] that compare so to the bound, and their ids, to the front of out_x
  /// and out_ids, in the same order, and returns their number. ids may be null, for 0 .. n - 1. The
  /// outputs may be x and ids, or lie before them in the same arrays; nothing is written after the
  /// last one moved.
  int (*select)(const float* x, const std::int32_t* ids, int n, Compare compare, float bound,
                float* out_x, std::int32_t* out_ids);
  /// sums[b] = sum of w[j] = exp((x[j] - shift) * scale) over the b-th kSumBlock elements of x[n];
  /// w is 0 where x is NaN. Each w[j] is written to weights[n] unless that is null.
  void (*exp_blocks)(const float* x, int n, float shift, float scale, float* sums, float* weights);

  // --- exchanges between ranks -------------------------------------------------------------------
  /// out[i, j] = scale[i] * (parts[0][i, j] + parts[1][i, j] + ...) for [rows, cols], added in this
  /// order; parts have rows ld apart. scale[rows] may be null, for 1.
  void (*sum_parts_f32)(const float* const* parts, int num_parts, std::ptrdiff_t ld, int rows,
                        int cols, const float* scale, float* out, std::ptrdiff_t ldo);
  void (*sum_parts_bf16)(const float* const* parts, int num_parts, std::ptrdiff_t ld, int rows,
                         int cols, const float* scale, bf16* out, std::ptrdiff_t ldo);
  /// The same for sums of products of rows that were centred on different values (struct
  /// Centering).
  void (*sum_centered_parts_f32)(const float* const* parts, int num_parts, std::ptrdiff_t ld,
                                 int rows, int cols, const Centering& centering, float* out,
                                 std::ptrdiff_t ldo);
  void (*sum_centered_parts_bf16)(const float* const* parts, int num_parts, std::ptrdiff_t ld,
                                  int rows, int cols, const Centering& centering, bf16* out,
                                  std::ptrdiff_t ldo);
  /// out[j] = x[j] * gain[j] for one row of n; returns the sum of x[j]^2. out may be x.
  float (*apply_gain_f32)(const float* x, const float* gain, int n, float* out);
  float (*apply_gain_bf16)(const float* x, const float* gain, int n, bf16* out);
  /// out[j] = (x[j] - mean(x)) * gain[j] for one row of n; statistics[2] = mean(x) and the sum of
  /// (x[j] - mean(x))^2, both 0 for an empty row.
  void (*center_row_f32)(const float* x, const float* gain, int n, float* out, float* statistics);
  void (*center_row_bf16)(const float* x, const float* gain, int n, bf16* out, float* statistics);
};

/// The kernels of an instruction set that this CPU supports (see base/cpu_features.h).
const KernelTable& kernels_for(Isa isa);

}  // namespace deinfer::cpu

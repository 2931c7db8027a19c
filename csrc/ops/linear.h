// A linear of one rank: weights, and the exchanges that its plan puts around them.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "kernels/cpu/packing.h"
#include "plan/rank_share.h"

namespace deinfer {

/// Where a linear's input, inner vector and output travel between ranks.
struct LinearExchanges {
  Exchange before = Exchange::kNone;
  Exchange after_v = Exchange::kNone;
  Exchange after_u = Exchange::kNone;
};

/// What completes a LayerNorm with gain g and bias b after V, where ranks have columns of its
/// input.
struct NormTerms {
  std::vector<float> gain;  // [ranks, r]: row i is V_i g_i of the columns of rank i
  std::vector<float> bias;  // [r]: V b
};

/// This rank's part of y[n] = W[n, k] x + b or U[n, r] (V[r, k] x) + b, packed for the CPU. fp32
/// weights take fp32 activations, bf16 and int8 weights bf16 ones.
struct LowRankLinear {
  std::string name;
  cpu::PackedMatrix w;  // dense; empty when low-rank
  cpu::PackedMatrix v;  // [r, k]; empty when dense, or when this rank has no row of it
  cpu::PackedMatrix u;  // [n, r]
  Buffer bias;          // fp32, in the packed row order, padded to 32; or empty
  int rank = 0;         // of the whole linear; 0 stands for the columns of u
  std::array<LinearExchanges, kNumStepKinds> exchanges;
  std::vector<Range> v_shares;  // the rows of V that each rank has, where z is gathered
  Range y_share;                // the columns that this rank keeps of an exchanged output
  NormTerms norm_terms;         // of what it reads; empty unless a LayerNorm is completed after V
  int x_col = 0;                // of a replicated input, the first column that W takes
  std::vector<std::int32_t> y_map;  // of an exchanged output, the order in which epilogues take its
                                    // columns (-1: padding, which does not travel); or empty

  /// Also where this rank's parts of both factors are empty.
  bool is_low_rank() const { return rank > 0 || !v.empty() || !u.empty(); }
  const cpu::PackedMatrix& output_factor() const { return is_low_rank() ? u : w; }
  cpu::PackedMatrix& output_factor() { return is_low_rank() ? u : w; }
  const LinearExchanges& exchange(StepKind kind) const {
    return exchanges[static_cast<std::size_t>(kind)];
  }
  bool has_bias() const { return bias.size() > 0; }
  std::size_t bytes() const { return w.bytes() + v.bytes() + u.bytes(); }
  /// Elements of z.
  int inner_size() const { return rank > 0 ? rank : u.k; }
  /// Columns that z takes in a z buffer (a multiple of 16).
  int z_cols() const {
    return is_low_rank() ? std::max((inner_size() + 15) / 16 * 16, v.n_pad) : 0;
  }
};

}  // namespace deinfer

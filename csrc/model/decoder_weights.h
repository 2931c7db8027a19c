// One rank's weights of a decoder.
#pragma once

#include <string>
#include <vector>

#include "base/check.h"
#include "comm/communicator.h"
#include "model/loader.h"
#include "model/model_config.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "plan/kv_forms.h"

namespace deinfer {

struct DecoderLayer {
  HeadShare heads;                              // to which this rank attends
  Norm attention_norm, mlp_norm;                // of what a block reads; [hidden]
  Norm attention_output_norm, mlp_output_norm;  // of what it adds to the residual stream
  Norm query_norm, key_norm;                    // as ModelConfig::qk_norm says; of `heads`
  LowRankLinear query, key, value, output;
  LowRankLinear gate, up, down;                 // gate is empty in a plain MLP
  KvForms kv;                                   // what the KV cache keeps
  std::vector<cpu::PackedMatrix> absorbed_key;  // U^T of every kv head, of keys that are absorbed

  /// Those that there are.
  std::vector<const LowRankLinear*> linears() const;
  std::size_t bytes() const;
};

struct DecoderWeights {
  cpu::WeightFormat format;             // of the matrices; int8 stands for weights only
  DType activations = DType::kFloat32;  // fp32 for fp32 weights, else bf16
  cpu::PackedMatrix embedding;  // [vocab, hidden]; empty when tied: then the head serves for both
  cpu::PackedMatrix positions;  // [position_offset + max_position, hidden]; empty when rotary
  std::vector<DecoderLayer> layers;
  Norm final_norm;     // [hidden]
  LowRankLinear head;  // [vocab, hidden]

  const cpu::PackedMatrix& token_embedding() const {
    return embedding.empty() ? head.w : embedding;
  }
  std::size_t bytes() const;
};

/// Whether q and k are rotated where they are computed: nothing comes between product and rotation.
bool rotates_tiles(const ModelConfig& config);

/// Throws kInternal where a rank keeps latents of a linear of which it has none, or not all.
template <typename Linear>
void check_has_latents(const Linear& linear, KvForm form) {
  if (form == KvForm::kDense) return;
  bool whole = linear.is_low_rank();
  for (const LinearExchanges& exchanges : linear.exchanges) {
    whole &= exchanges.after_u == Exchange::kNone;
  }
  if (!whole) fail(ErrorCode::kInternal, linear.name, " has no latents to be cached");
}

/// The norm called `prefix` + `name` of n numbers; none where `name` is empty.
Norm load_norm(const ModelConfig& config, const std::string& prefix, const std::string& name, int n,
               WeightLoader& loader);

/// The norm of q or k with so many heads, of which this rank has `own`.
Norm load_head_norm(const ModelConfig& config, const std::string& prefix, const std::string& name,
                    int heads, Range own, WeightLoader& loader);

/// Loads the weights of `config` in `format` (set on the loader). `kv_forms` of every layer, or
/// none for dense ones; latents only of linears that are low-rank and whose whole z every rank has.
DecoderWeights load_decoder(const ModelConfig& config, const RankShare& share,
                            cpu::WeightFormat format, const std::vector<KvForms>& kv_forms,
                            WeightLoader& loader);

/// Computes LowRankLinear::norm_terms where the plan divides what linears read by columns. All
/// ranks must call it, once all have loaded their weights.
void share_norm_terms(DecoderWeights& weights, const RankShare& share, ThreadTeam& team,
                      Communicator& communicator);

}  // namespace deinfer

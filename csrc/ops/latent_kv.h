// From latents in the KV cache to attention: K and V rebuilt for a split, queries that have taken
// in U of the keys, outputs to which U of the values is applied.
#pragma once

#include <span>

#include "ops/context.h"
#include "ops/kv_cache.h"
#include "ops/linear_group.h"
#include "ops/lowrank_linear.h"
#include "ops/norm.h"
#include "plan/norms.h"

namespace deinfer {

/// What makes K and V of a layer from its latents; a side that is dense needs nothing.
struct LatentKv {
  const LowRankLinear* key = nullptr;
  const LowRankLinear* value = nullptr;
  std::span<const cpu::PackedMatrix> absorbed_key;  // U^T[r, head_dim] of every kv head
  RotaryAngles angles;  // of all positions, not of a batch; none where keys are not rotated
  QkNormKind key_norm_kind = QkNormKind::kNone;
  const Norm* key_norm = nullptr;
};

/// The heads of attention on a rank.
struct HeadCounts {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;

  int group() const { return heads / kv_heads; }
};

/// Puts z of a linear into the slots of a side. Absorbed keys lie as keys do, by groups of tokens,
/// all other latents as values do.
class StoreLatent final : public LatentStore {
 public:
  StoreLatent(const KvSide& side, bool is_key, int rank, std::span<const KvSlot> slots)
      : side_(side),
        by_groups_(is_key && side.shape.form == KvForm::kAbsorbed),
        columns_(side.shape.form == KvForm::kRebuilt ? padded_rank(rank) : rank),
        slots_(slots) {}
  void store(const Activations& z, int row) const override;

 private:
  const KvSide& side_;
  bool by_groups_;
  int columns_;  // of z, with the zero that products read after an odd rank
  std::span<const KvSlot> slots_;
};

/// The number that a norm over all heads multiplies the keys of a slot with.
void store_key_scale(const KvSide& side, KvSlot slot, float scale);

/// Bytes of a rebuilt split of one kv head.
std::size_t rebuilt_split_bytes(DType dtype, int head_dim);

/// Makes K, or V, of kv head `head` at `positions` of one split, numbered as in side.share(), with
/// the bits that a dense cache would have, in the layout of a block of kKvSplit tokens. One thread
/// does it for itself, with the tiles of its scratch memory.
void rebuild_keys(ExecutionContext& ctx, const LatentKv& latents, const KvSide& side,
                  const HeadCounts& counts, int head, const std::int32_t* block_table,
                  Range positions, std::byte* out);
void rebuild_values(ExecutionContext& ctx, const LatentKv& latents, const KvSide& side,
                    const HeadCounts& counts, int head, const std::int32_t* block_table,
                    Range positions, std::byte* out);

/// out[m, heads, r] (fp32) = U^T q of every head, for q[m, heads * head_dim] in the activation
/// type. A bias of the keys adds the same to all scores of a query, which softmax cancels.
/// Collective.
void absorb_keys(ExecutionContext& ctx, int m, const LatentKv& latents, const HeadCounts& counts,
                 const Activations& q, float* out);

/// out[m, heads * head_dim] = U x + b of every head, for x[m, heads] vectors of u.k_pad elements,
/// both in the activation type. (Probabilities add up to 1, so that b stays b.) Collective.
void expand_values(ExecutionContext& ctx, int m, const LatentKv& latents, const HeadCounts& counts,
                   const Activations& x, const Activations& out);

/// U^T of every kv head: from the rows of `linear`, which are packed in order.
std::vector<cpu::PackedMatrix> transposed_heads(const LowRankLinear& linear, int kv_heads,
                                                int head_dim, ThreadTeam& team);

}  // namespace deinfer

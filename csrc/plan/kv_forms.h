// What the KV cache keeps of K and V: themselves, or the latents z = V x of decomposed projections
// (arXiv 2604.17709 has both of one rank; absorption after arXiv 2405.04434).
#pragma once

#include <cstdint>
#include <vector>

namespace deinfer {

enum class KvForm : std::uint8_t {
  kDense,     // K or V
  kAbsorbed,  // z, which attention works on itself: scores (U^T q) z, outputs U (sum of p z)
  kRebuilt,   // z, of which attention makes K or V again, 256 positions at a time
};

const char* kv_form_name(KvForm form);

/// Of one layer.
struct KvForms {
  KvForm k = KvForm::kDense;
  KvForm v = KvForm::kDense;
  /// Over tensor-parallel ranks: each keeps its share of the tokens, of all heads, and attends to
  /// these for all heads; what they find is merged. Else each keeps all tokens: latents, and of
  /// dense sides its heads. Only layers with latents are token-sharded.
  bool token_sharded = false;

  bool any_latent() const { return k != KvForm::kDense || v != KvForm::kDense; }
  bool operator==(const KvForms&) const = default;
};

/// What one rank keeps of K or V of a layer per token.
struct KvSideShape {
  KvForm form = KvForm::kDense;
  int heads = 0;  // that have a vector each; of latents 1
  int dim = 0;    // elements of a vector

  std::uint64_t elements() const {
    return static_cast<std::uint64_t>(heads) * static_cast<std::uint64_t>(dim);
  }
  bool operator==(const KvSideShape&) const = default;
};

struct KvLayerShape {
  KvSideShape k, v;
  int ranks = 1;  // that divide the tokens; each keeps equally many of a block

  /// Per token of a sequence, on average.
  double elements() const { return static_cast<double>(k.elements() + v.elements()) / ranks; }
  bool operator==(const KvLayerShape&) const = default;
};

/// Elements that products read of a latent: pairs.
constexpr int padded_rank(int rank) { return (rank + 1) / 2 * 2; }

/// What decides how a layer's latents are used, the same on all ranks.
struct KvTraits {
  int group = 1;  // heads that share a kv head
  int head_dim = 0;
  bool absorbs_keys = false;  // scores are a product of q and k = U z + b alone: nothing turns,
                              // norms or caps them
  bool scales_keys = false;   // a norm over all heads needs a number per token besides z
};

/// How latents of K or V are used: absorbed, unless that takes more arithmetic in decoding than
/// rebuilding what `group` heads share. A token's bits must not depend on its company, so this
/// depends on the shape alone.
KvForm latent_key_form(const KvTraits& traits, int rank);
KvForm latent_value_form(const KvTraits& traits, int rank);

/// What is kept of a side in `form`: kv_heads * head_dim elements when dense; `rank` when absorbed;
/// when rebuilt `rank` rounded up to 2, which products read, and for keys that are scaled a float.
KvSideShape kv_key_shape(const KvTraits& traits, KvForm form, int rank, int kv_heads,
                         int element_bytes);
KvSideShape kv_value_shape(const KvTraits& traits, KvForm form, int rank, int kv_heads);

/// Floating-point operations of a side per position that a token sees: of `heads` query heads, and
/// to rebuild `kv_heads` kv heads, which all tokens of a unit of attention share.
double kv_attention_flops(const KvTraits& traits, KvForm form, int rank, int heads);
double kv_rebuild_flops(const KvTraits& traits, KvForm form, int rank, int kv_heads);

}  // namespace deinfer

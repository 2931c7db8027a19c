#include "plan/kv_forms.h"

namespace deinfer {
namespace {

/// Of the heads that share a kv head, for a position.
bool rebuilding_is_cheaper(const KvTraits& traits, int rank) {
  return kv_attention_flops(traits, KvForm::kRebuilt, rank, traits.group) +
             kv_rebuild_flops(traits, KvForm::kRebuilt, rank, 1) <
         kv_attention_flops(traits, KvForm::kAbsorbed, rank, traits.group);
}

}  // namespace

const char* kv_form_name(KvForm form) {
  switch (form) {
    case KvForm::kDense: return "dense";
    case KvForm::kAbsorbed: return "absorbed";
    case KvForm::kRebuilt: return "rebuilt";
  }
  return "";
}

KvForm latent_key_form(const KvTraits& traits, int rank) {
  // U^T q reads pairs of elements of q.
  const bool absorbs = traits.absorbs_keys && traits.head_dim % 2 == 0;
  return absorbs && !rebuilding_is_cheaper(traits, rank) ? KvForm::kAbsorbed : KvForm::kRebuilt;
}

KvForm latent_value_form(const KvTraits& traits, int rank) {
  return rebuilding_is_cheaper(traits, rank) ? KvForm::kRebuilt : KvForm::kAbsorbed;
}

KvSideShape kv_key_shape(const KvTraits& traits, KvForm form, int rank, int kv_heads,
                         int element_bytes) {
  KvSideShape shape = kv_value_shape(traits, form, rank, kv_heads);
  if (form == KvForm::kRebuilt && traits.scales_keys) {
    shape.dim += static_cast<int>(sizeof(float)) / element_bytes;
  }
  return shape;
}

KvSideShape kv_value_shape(const KvTraits& traits, KvForm form, int rank, int kv_heads) {
  switch (form) {
    case KvForm::kDense: return {form, kv_heads, traits.head_dim};
    case KvForm::kAbsorbed: return {form, 1, rank};
    case KvForm::kRebuilt: return {form, 1, padded_rank(rank)};
  }
  return {};
}

double kv_attention_flops(const KvTraits& traits, KvForm form, int rank, int heads) {
  return 2.0 * heads * (form == KvForm::kAbsorbed ? rank : traits.head_dim);
}

double kv_rebuild_flops(const KvTraits& traits, KvForm form, int rank, int kv_heads) {
  return form == KvForm::kRebuilt ? 2.0 * kv_heads * traits.head_dim * rank : 0.0;
}

}  // namespace deinfer

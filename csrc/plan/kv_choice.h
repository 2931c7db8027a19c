// Which layers keep latents in their KV cache: all that can, or those with which the predicted
// throughput is best. Latents save memory, so that more sequences decode together, and cost (or, of
// models without rotation and with few kv heads, save) time.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plan/cost_model.h"

namespace deinfer {

/// What an engine wants of its KV cache.
struct KvDemand {
  int context = 512;          // tokens of a sequence
  int max_sequences = 256;    // that decode together, where there is room
  std::uint64_t bytes = 0;    // of a rank's cache; 0: no limit
  bool with_weights = false;  // which share these bytes
  std::int64_t tokens = -1;   // room that does not depend on the forms; -1: bytes decide
};

/// What an engine's or a planner's configuration says.
struct KvRequest {
  std::string_view cache = "dense";   // "dense", "latent", "auto"
  std::string_view latents = "auto";  // over ranks: "replicated", "token_sharded", "auto"

  /// Throws kInvalidArgument for any other value.
  void validate() const;
};

struct KvChoice {
  std::vector<KvForms> forms;  // of every layer
  std::string reason;
};

/// The latents that each layer can keep under `plan`: its linear is decomposed, and every rank has
/// the whole of z. `token_sharded` as KvForms, where there are ranks and latents.
std::vector<KvForms> latent_kv_forms(const PlannedModel& model, const TensorParallelPlan& plan,
                                     bool token_sharded);

/// request.cache: "latent": latent_kv_forms(), or "auto": sides become latent in the order of time
/// added per byte saved, as many as give the best decoding throughput that the cost model predicts,
/// and none for less than 2 % or where no further sequence finds room. request.latents: "auto":
/// what promises more throughput. Throws kInvalidArgument for unknown values, and for "latent"
/// where nothing can be latent.
KvChoice choose_kv_forms(const KvRequest& request, const PlannedModel& model,
                         const TensorParallelPlan& plan, const Hardware& hardware,
                         const LinkModel& link, const KvDemand& demand);

/// The largest ranks of keys and of values with which decoding from latents of this side, the other
/// one dense, takes no longer than from a dense cache, exchanges aside; 0: none.
struct KvBreakEven {
  int k = 0;
  int v = 0;
};
KvBreakEven kv_break_even(const PlannedModel& model, const TensorParallelPlan& plan,
                          const Hardware& hardware, bool token_sharded);

/// Such as "K dense, V absorbed in 20 layers and dense in 2; 2 ranks divide the tokens".
std::string kv_forms_text(const std::vector<KvForms>& forms, int ranks);

}  // namespace deinfer

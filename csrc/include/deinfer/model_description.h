// deinfer/model_description.h: what a checkpoint is, from its config.json alone.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "deinfer/export.h"

namespace deinfer {
inline namespace DEINFER_ABI {

/// A matrix of a layer, dense or decomposed.
struct LinearDescription {
  std::string name;  // of its module, e.g. "model.layers.0.self_attn.q_proj"
  int out_features = 0;
  int in_features = 0;
  int rank = 0;  // as config.json's low_rank says; 0: dense
};

/// Layers whose attention works alike.
struct AttentionDescription {
  int num_layers = 0;
  int window = 0;         // positions a token sees, itself included; 0: all
  std::string rope_type;  // of the rotation, as config.json names it; "": positions are learned
  double rope_theta = 0;
  double rope_factor = 1;
};

/// How tensors of a checkpoint that holds more than the text model are called in it: those whose
/// names start with `prefix` stand for `replacement`..., or are not read where there is none.
struct TensorPrefix {
  std::string prefix;
  std::optional<std::string> replacement;
};

struct ModelDescription {
  std::string model_type;
  int num_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_model_len = 0;
  bool tied_embeddings = false;
  std::string activation;         // "silu", "gelu_pytorch_tanh", "relu"
  std::string norm;               // "rms", "layer"
  bool norms_inputs = false;      // of what blocks read
  bool norms_outputs = false;     // of what blocks add to the residual stream
  std::string qk_norm;            // "none", "per_head", "full": over all heads
  double attention_soft_cap = 0;  // 0: none
  double logit_soft_cap = 0;
  std::vector<AttentionDescription> attention;
  std::vector<LinearDescription> linears;  // of all layers, in the order in which they run
  std::string embedding;                   // name of its tensor, whose type "auto" goes by
  std::vector<TensorPrefix> tensor_prefixes;
  std::uint64_t parameters = 0;             // without biases, which config.json need not mention
  std::uint64_t kv_elements_per_token = 0;  // of K and V, all layers together
  // The same with kv_cache="latent" on one rank, as the ranks of config.json say; beside elements
  // there are bytes of factors of norms of k over all heads.
  std::uint64_t latent_kv_elements_per_token = 0;
  std::uint64_t latent_kv_factor_bytes_per_token = 0;
};

/// Reads `path`, a checkpoint directory or a config.json. Throws kInvalidArgument naming a bad
/// field and its value, kUnsupported for an architecture or feature that deinfer does not run.
DEINFER_API ModelDescription describe_config(const std::string& path);

/// Every model_type that deinfer runs.
DEINFER_API std::vector<std::string> supported_architectures();

}  // namespace DEINFER_ABI
}  // namespace deinfer

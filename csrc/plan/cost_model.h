// Predicted time of one step of a tensor-parallel decoder, from its shapes: every product reads its
// weights or computes, whichever takes longer; every operation costs a fixed time; attention reads
// the KV cache or computes; exchanges follow the alpha-beta model (comm/link_model.h). Ranks wait
// for the slowest at every product.
//
// Not modelled: contention of exchanges with computation for memory, clock changes, the host.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/link_model.h"
#include "plan/exchanges.h"
#include "plan/kv_forms.h"

namespace deinfer {

/// What one rank runs on.
struct Hardware {
  std::string name;
  double memory_bytes_per_s = 0;     // of weights that stream once
  double flops_per_s = 0;            // of products of many tokens
  double attention_bytes_per_s = 0;  // of the KV cache
  double attention_flops_per_s = 0;
  double operation_s = 0;  // launch, ramp and tail of one operation
  // What an exchange takes of computing, besides the link: per exchange, and to read and sum what
  // the ranks have contributed. 0: the link's model has it all.
  double exchange_s = 0;
  double received_bytes_per_s = 0;
  std::uint64_t memory_bytes = 0;  // 0: not known
  int tile_tokens = 0;             // that a product takes at once; 0: any
  // Of products that make K or V of the latents of a block, written as attention reads them; 0: as
  // products of many tokens.
  double rebuild_flops_per_s = 0;
};

/// "h100" (SXM, operations as kernels of their own in a CUDA graph) or "cpu:GB_per_s:GFLOP_per_s"
/// with the rates of one rank. Throws kInvalidArgument naming the text.
Hardware parse_hardware(std::string_view text);

/// A decoder as planning sees it.
struct PlannedModel {
  ModelShape shape;
  std::vector<LayerShape> layers;
  LinearShape head;
  bool tied_embeddings = false;
  LayerNorms norms;
  bool absorbs_keys = false;  // as KvTraits
  bool scales_keys = false;   // likewise
  int positions = 0;          // rows of the table of learned ones
  int weight_bytes = 2;       // of an element of a linear
  int activation_bytes = 2;   // of z, the KV cache and an untied embedding: 2 or 4

  std::vector<KvForms> kv_forms() const;  // of every layer
  void set_kv_forms(const std::vector<KvForms>& forms);

  KvTraits kv_traits() const {
    return {shape.num_heads / shape.num_kv_heads, shape.head_dim, absorbs_keys, scales_keys};
  }
};

/// What a step computes.
struct Phase {
  bool prefill = false;
  int tokens = 1;   // decode: sequences, one token each; prefill: of one chunk of one sequence
  int context = 0;  // tokens before these, per sequence
};

/// Seconds of one step.
struct StepCost {
  double products = 0;
  double operations = 0;  // fixed costs
  double attention = 0;
  double exchanges = 0;  // what computation does not hide
  int chunks = 1;        // in which a product and its exchange are cut, so that they overlap
  double total() const { return products + operations + attention + exchanges; }
};

/// The cost of a step in `chunks` chunks as the runtime overlaps them (plan/overlap.h): of the rank
/// dimension for few tokens, else of the tokens. What the cutting costs counts as exchange: further
/// operations, sums written and read, weights that are read again. The embedding and what follows
/// the layers overlap with nothing.
StepCost step_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                   const Hardware& hardware, const LinkModel& link, const Phase& phase, int chunks);

/// The cheapest with 1, 2, 4, ... up to `max_chunks` chunks, of which more must save 3 % at least.
StepCost best_step_cost(const PlannedModel& model, const TensorParallelPlan& plan,
                        const Hardware& hardware, const LinkModel& link, const Phase& phase,
                        int max_chunks);

/// Bytes of the weights of one rank, without padding: linears, embedding, norms.
std::uint64_t rank_weight_bytes(const PlannedModel& model, const TensorParallelPlan& plan,
                                int rank);
/// The same of the rank with most.
std::uint64_t most_weight_bytes(const PlannedModel& model, const TensorParallelPlan& plan);
/// Bytes that a token takes in the KV cache of one rank, on average where ranks divide the tokens,
/// rounded up.
std::uint64_t rank_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan, int rank);
/// The same of the rank with most.
std::uint64_t most_kv_bytes(const PlannedModel& model, const TensorParallelPlan& plan);
/// What a rank keeps of a layer.
KvLayerShape rank_kv_shape(const PlannedModel& model, const TensorParallelPlan& plan,
                           const LayerShape& layer, int rank);
/// Seconds of the attention of a layer, on the slowest rank, without exchanges.
double attention_seconds(const PlannedModel& model, const TensorParallelPlan& plan,
                         const Hardware& hardware, const Phase& phase, const LayerShape& layer);
/// Bytes that a rank sends for one decoded token, on average over ranks, by the formulas of
/// comm/communicator.h.
double wire_bytes_per_token(const PlannedModel& model, const TensorParallelPlan& plan);

}  // namespace deinfer

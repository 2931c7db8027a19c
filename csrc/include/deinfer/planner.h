// deinfer/planner.h: which tensor-parallel plan suits a model, from its config.json alone.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "deinfer/export.h"

namespace deinfer {
inline namespace DEINFER_ABI {

struct PlannerConfig {
  std::string model;               // directory with config.json, or that file
  int tensor_parallel_size = 1;    // ranks, each on a device of its own
  std::string link = "nvlink";     // between ranks: "nvlink", "pcie", "ethernet" or
                                   // "latency_us:GB_per_s"
  std::string hardware = "h100";   // of a rank: "h100" or "cpu:GB_per_s:GFLOP_per_s"
  std::string dtype = "bfloat16";  // of the weights: "float32", "bfloat16", "int8"
  double keep = 0;                 // 0: the ranks of config.json; in (0, 1]: every linear at the
                                   // rank that keeps this share of its parameters
  double memory_gib = 0;           // of a rank; 0: what the hardware has
  int context = 1024;              // tokens per sequence at which decoding is predicted
  std::vector<int> batches = {1, 4, 16, 64, 256};  // sequences that decode together
  std::vector<int> prefill = {2048};               // tokens of a prompt chunk
  /// How much each phase counts, by name ("decode:16", "prefill:2048"). Empty: equally decode:1,
  /// decode:16 and decode:64, where listed (else all batches), and every prefill.
  std::map<std::string, double> mix;
  std::string kv_cache = "dense";   // "dense", "latent" or "auto", as EngineConfig; "auto" is
                                    // for decoding the largest batch of `batches` at `context`
  std::string kv_latents = "auto";  // "replicated", "token_sharded" or "auto", as EngineConfig
  int max_chunks = 1;  // 1, 2 or 4: chunks of a product whose exchanges overlap with computation
};

/// Predicted seconds of one step.
struct PhaseEstimate {
  std::string phase;  // "decode:16": a token for each of 16 sequences; "prefill:2048"
  double seconds = 0;
  // which are:
  double product_seconds = 0;
  double operation_seconds = 0;  // fixed costs
  double attention_seconds = 0;
  double exchange_seconds = 0;  // that computation does not hide
  int chunks = 1;
};

struct PlanEstimate {
  std::string plan;
  std::string layout;  // of the weights; plans with the same layout can take turns
  // Exchanges of a layer, on average.
  double all_reduces = 0;
  double all_gathers = 0;
  double reduce_scatters = 0;
  double wire_bytes_per_token = 0;       // that a rank sends for a decoded token
  std::uint64_t weight_bytes = 0;        // of the rank with most
  std::uint64_t kv_bytes_per_token = 0;  // likewise, in what PlannerConfig::kv_cache chooses
  std::uint64_t dense_kv_bytes_per_token = 0;
  std::uint64_t latent_kv_bytes_per_token = 0;  // with all latents that there can be, replicated
  std::uint64_t token_sharded_kv_bytes_per_token = 0;  // or divided by tokens
  bool kv_token_sharded = false;                       // in what was chosen
  std::string kv_reason;                               // what was chosen, and why
  // The largest ranks of k and of v with which decoding takes no longer from latents, exchanges
  // aside, replicated or token-sharded as chosen.
  int k_break_even = 0;
  int v_break_even = 0;
  std::int64_t kv_tokens = -1;        // that fit beside the weights; -1: memory not known
  bool fits = true;                   // the largest batch of the mix at `context`
  std::vector<PhaseEstimate> phases;  // of every batch, then every prefill
};

/// The plan for one phase, within the chosen layout.
struct PhaseChoice {
  std::string phase;
  std::string plan;
  double weight = 0;  // in the mix; all weights add up to 1
  double seconds = 0;
};

struct PlanReport {
  std::vector<PlanEstimate> plans;
  std::string layout;                // the choice; empty when nothing fits
  std::vector<PhaseChoice> choices;  // of every phase; empty when nothing fits
  std::string decode_plan;           // best for the decode phases of the mix together
  std::string prefill_plan;
  std::string reason;
  // What was assumed.
  double link_latency_s = 0;
  double link_bytes_per_s = 0;
  double memory_bytes_per_s = 0;
  double flops_per_s = 0;
  std::uint64_t memory_bytes = 0;  // of a rank; 0: not known
};

/// Reads config.json and predicts every plan. Throws kInvalidArgument naming a bad field and its
/// value, kUnsupported for an architecture that deinfer does not run.
DEINFER_API PlanReport plan_tensor_parallelism(const PlannerConfig& config);

}  // namespace DEINFER_ABI
}  // namespace deinfer

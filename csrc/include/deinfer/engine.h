// deinfer/engine.h: load a checkpoint, submit requests, step until done.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "deinfer/export.h"
#include "deinfer/length_accuracy.h"
#include "deinfer/sampling_params.h"

namespace deinfer {
inline namespace DEINFER_ABI {

using RequestId = std::uint64_t;

struct DEINFER_API EngineConfig {
  std::string model;           // directory: config.json and *.safetensors
  std::string device = "cpu";  // "cpu", "cuda" (the first device, or round robin over all of them
                               // for several ranks), "cuda:N" (all ranks there), or "auto": as
                               // "cuda" where there is a device that serves, else the CPU. On
                               // CUDA: bfloat16 or int8, at most 8 ranks
  std::string dtype = "auto";  // "float32", "bfloat16"; "int8": weights rounded to 8 bits with a
                               // scale per row, all else bfloat16; auto: bfloat16 for bf16
                               // checkpoints, else float32 (so that no weight loses bits; on
                               // CUDA bfloat16, too)
  std::string weight_compression = "auto";  // of bfloat16 weights in memory: "lossless": 12 bits
                                            // each, and the same results; "none": 16 bits; "auto":
                                            // lossless with AVX-512-BF16, and with AVX2 where
                                            // max_num_seqs is at most 2
  int tensor_parallel_size = 1;             // rank threads in this process
  std::string tensor_parallel_plan = "auto";
  std::string emulated_link;  // "": none; "nvlink", "pcie", "ethernet" or "latency_us:GB_per_s":
                              // the ranks' exchanges take as long as over such a link
  int exchange_chunks = 0;  // parts in which a step's exchanges are cut, so that computing the next
                            // part hides the exchange of one. Steps of more than 128 tokens are cut
                            // by tokens (at least 16 each, at most 512 whatever is said here),
                            // others by the rank dimension of the linears whose inner vectors are
                            // summed over ranks (in 4 parts at most); results have the same bits.
                            // 1: whole; 0: with emulated_link what the cost model predicts to be
                            // fastest, else 1
  int num_threads = 0;      // CPU threads per rank; 0: the cores of the affinity mask, or
                            // the CPU quota if less, / ranks
  int max_model_len = 0;    // tokens per sequence; 0: the model's own limit
  int max_num_seqs = 256;   // samples in one batch
  int max_num_batched_tokens = 512;  // tokens in one step
  int block_size = 16;               // tokens per KV block, a multiple of 16
  std::int64_t num_kv_blocks = 0;    // 0: from kv_cache_bytes
  std::uint64_t kv_cache_bytes = 0;  // 0: a quarter of the memory available after loading; on a
                                     // CUDA device nine tenths of what is free there, for all its
                                     // ranks together
  std::string kv_cache = "dense";  // what is kept of every token: "dense": K and V; "latent": z = V
                                   // x of every decomposed projection to k or v, of any rank, and
                                   // the others dense; "auto": in each layer of K and of V what
                                   // promises the most throughput, see ModelInfo::kv_reason
  std::string kv_latents = "auto";  // of latents over ranks: "replicated": every rank keeps all;
                                    // "token_sharded": every rank keeps those of its share of the
                                    // tokens, so that the capacity grows with the ranks, and has q,
                                    // k and v of all heads; block_size is then rounded up to a
                                    // multiple of 16 x ranks; "auto": what promises more
                                    // throughput; CUDA devices have replicated ones only
  std::string scheduling_policy = "fcfs";  // "fcfs", "hrrn", "length_bucket", "longest_tail",
                                           // "sjf", "static", "static_bucket"
  std::string admission = "peak";  // what a waiting sequence must find room for: "peak" of the
                                   // future KV of all that run, by expected lengths; "prompt": its
                                   // known tokens; "max_tokens": all that anyone may ever need
  double safety = 0.0;             // [0, 1]: admission's lengths between mean and 90 % quantile
  double kv_watermark = 0.03;      // [0, 1): share of the KV blocks that admission leaves free
  int max_pause = 8;      // steps that a sequence waits for a KV block before another is evicted
  int preempt_limit = 2;  // evictions of a sequence, after which it lacks no block; 0: no limit
  std::optional<double> promote_after;      // seconds of waiting after which a sequence goes first;
                                            // 0: never; empty: as the policy needs it
  std::optional<double> promote_per_token;  // the same, per expected token
  int bucket_width = 50;                    // expected tokens, of length_bucket and static_bucket
  // Static batches, which nothing joins: "static" by arrival, "static_bucket" by expected length.
  int static_group = 256;      // sequences that are sorted into buckets together
  int static_batch_size = 16;  // by arrival, beyond the buckets below, and of those that outlived
                               // their bucket, which run again at the end of their group:
  std::vector<int> bucket_batch_sizes = {256, 128, 64, 32};  // of the shortest buckets
  std::string recompute = "continue";  // after the tokens that they have; "restart": all again
  std::string event_log;  // "": none; else the path of a file that all calls of the scheduler are
                          // written to, prompts' token ids included, to be replayed
  bool enable_prefix_caching = true;
  std::vector<int> hidden_state_layers;  // that requests may ask for, numbered as transformers
                                         // does: 0 enters the first block, i leaves block i, the
                                         // last has passed the final norm
  std::string length_predictor;  // "": none; "hidden_state": MODEL/perception/hidden_state.json; or
                                 // the path of such a file: the head that tells the scheduler how
                                 // long answers become
  std::uint64_t seed = 0;        // base of the seeds of requests that bring none

  /// Throws Error(kInvalidArgument) naming the field and its value.
  void validate() const;
};

enum class FinishReason : std::uint8_t { kNone, kStop, kLength, kAbort };

/// What one sample of a request gained in a step.
struct SequenceOutput {
  int index = 0;                                    // of the sample, [0, n)
  std::vector<TokenId> new_token_ids;               // since the previous step
  std::vector<std::vector<TokenLogprob>> logprobs;  // one list per new token, chosen token first
  FinishReason finish_reason = FinishReason::kNone;
  std::optional<TokenId> stop_token_id;  // the token that ended it (kStop)
  // Where SamplingParams::hidden_states asks for them, else empty: [2, layers, hidden], the states
  // of the newest token before new_token_ids (the prompt's last, or a generated one), and the means
  // of those of the prompt's last and all generated tokens up to it.
  std::vector<float> hidden_states;
  int hidden_states_position = 0;  // generated tokens up to it
};

/// What is believed about the length of an answer: lengths[i] (generated tokens) has the weight
/// probabilities[i]; at most 16 of each. Advisory: it may change the order of requests, never their
/// tokens, and whatever is no distribution (NaN, infinity, all zero) counts as no belief.
struct LengthBelief {
  std::vector<float> lengths;
  std::vector<float> probabilities;
};

/// One request's progress in a step.
struct RequestOutput {
  RequestId request_id = 0;
  std::vector<SequenceOutput> outputs;
  bool finished = false;  // all samples have ended
  // Filled once, in the step in which the first sample's prompt is complete:
  std::vector<std::vector<TokenLogprob>> prompt_logprobs;  // [prompt length - 1]
  std::vector<float> prompt_logits;                        // [prompt_length, vocabulary]
  int prompt_length = 0;
};

/// What the KV cache keeps of a layer on rank 0. Forms: "dense"; of latents "absorbed": attention
/// works on them as they are, and "rebuilt": it makes K or V of them, some positions at a time.
struct KvLayerInfo {
  std::string k, v;
  std::uint64_t k_bytes = 0, v_bytes = 0;  // per token that it keeps
  int ranks = 1;                           // that divide the tokens
};

/// What was loaded.
struct ModelInfo {
  std::string architecture;  // model_type of config.json
  std::string dtype;
  std::string weight_compression;  // of most of the weights: "lossless" or "none"
  std::string isa;
  int num_layers = 0;
  int hidden_size = 0;
  int vocab_size = 0;
  int max_model_len = 0;
  int num_threads = 0;
  std::uint64_t parameters = 0;    // of the checkpoint as it is run, tied weights once
  std::uint64_t weight_bytes = 0;  // resident on all ranks, padding included
  std::uint64_t kv_cache_bytes = 0;
  std::int64_t num_kv_blocks = 0;
  int block_size = 0;                          // tokens of a block
  std::string kv_cache;                        // as configured
  std::string kv_reason;                       // why the layers keep what they do
  std::uint64_t kv_bytes_per_token = 0;        // on all ranks
  std::uint64_t dense_kv_bytes_per_token = 0;  // were all layers dense
  std::vector<KvLayerInfo> kv_layers;
  int lowrank_matrices = 0;
  int dense_matrices = 0;  // decomposable matrices that stayed dense
  int tensor_parallel_size = 1;
  std::string decode_plan;  // of tensor parallelism
  std::string prefill_plan;
  std::vector<std::uint64_t> rank_weight_bytes;  // resident, per rank
};

/// One rank's exchanges of a kind since the engine began.
struct CollectiveStats {
  std::string name;  // "all_reduce", "all_gather", ...
  std::uint64_t calls = 0;
  std::uint64_t bytes = 0;       // contributed
  std::uint64_t wire_bytes = 0;  // sent, by the formulas of csrc/comm/communicator.h
};

/// Counters of a running engine.
struct EngineStats {
  int num_waiting = 0;
  int num_running = 0;
  std::int64_t free_kv_blocks = 0;  // cached blocks that can be evicted count as free
  std::int64_t num_steps = 0;
  std::int64_t used_kv_blocks = 0;      // held by running sequences
  std::int64_t promised_kv_blocks = 0;  // that these still need for their known tokens
  std::int64_t forecast_kv_blocks = 0;  // most that they were expected to hold at the last
                                        // admission by forecast; 0: none yet
  double kv_forecast_error = 0.0;  // most blocks forecast less most used, of the last 256 steps, as
                                   // a share of all: positive where admission held back too much
  std::int64_t num_preemptions = 0;      // all of these:
  std::int64_t evicted_for_decode = 0;   // no block for another one's next token
  std::int64_t evicted_for_prefill = 0;  // no block for another one's prompt
  std::int64_t set_aside = 0;            // by the policy
  std::int64_t paused_steps = 0;         // of sequences that waited for a block with their KV
  std::int64_t num_promotions = 0;       // sequences that waited too long and went first
  std::int64_t recomputed_tokens = 0;    // after preemptions
  double effective_token_ratio = 1.0;    // generated by generated and recomputed tokens
  LengthAccuracy length_accuracy;        // of the expectations at admission
  std::int64_t prefix_hit_tokens = 0;
  std::int64_t prompt_tokens = 0;  // computed
  std::int64_t generated_tokens = 0;
  std::int64_t execute_us = 0;  // between the start and the end of batches: the model's forward
                                // passes, and sampling; the rest is scheduling and bookkeeping
  std::int64_t length_predictions = 0;  // made by the head of EngineConfig::length_predictor
  std::int64_t length_predictor_us = 0;
  std::vector<CollectiveStats> collectives;  // of rank 0; kinds that were used
};

/// Called while weights load with (bytes done, bytes in all), from the constructing thread.
using LoadProgress = std::function<void(std::uint64_t, std::uint64_t)>;

/// Owns weights, KV blocks and rank threads. submit(), abort() and stats() are thread-safe; one
/// thread at a time calls step(). Throws Error; after a worker has failed every later call rethrows
/// that first failure.
class DEINFER_API Engine {
 public:
  explicit Engine(EngineConfig config, const LoadProgress& progress = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Validates and copies; kInvalidArgument for an empty or over-long prompt, token ids outside the
  /// vocabulary or bad parameters, kOutOfMemory for a request that the KV pool can never hold.
  /// A sample ends with kLength at max_tokens or when the context (max_model_len) is full.
  /// `belief` (kInvalidArgument for other numbers of lengths than probabilities, or too many) holds
  /// until the engine's own predictor knows better.
  RequestId submit(std::span<const TokenId> prompt, const SamplingParams& params,
                   const LengthBelief& belief = {});

  /// Ends one sample or (no index) all samples of a request; false if unknown or already ended.
  /// Their last outputs (kAbort) come with the next step(), which reports nothing else of them.
  bool abort(RequestId id, std::optional<int> index = std::nullopt);

  /// Runs one batch; returns the requests that progressed. Empty when nothing is unfinished. On
  /// CUDA devices the next batch has been started when it returns: the device computes it while the
  /// caller reads, and what is submitted meanwhile joins the one after it.
  std::vector<RequestOutput> step();
  bool has_unfinished_requests() const;

  const ModelInfo& model_info() const;
  EngineStats stats() const;

 private:
  struct DEINFER_LOCAL Impl;
  std::unique_ptr<Impl> impl_;
};

/// The instruction sets whose kernels this CPU can run, ascending; the environment variable
/// DEINFER_CPU_ISA selects one of them for engines created later.
DEINFER_API std::vector<std::string> supported_isas();

/// The library's version, "major.minor.patch".
DEINFER_API const char* version();

}  // namespace DEINFER_ABI
}  // namespace deinfer

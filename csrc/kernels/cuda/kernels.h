// The kernels of the CUDA engine, as host code launches them. Every launch_*() puts one kernel (or
// two that belong together) into the stream and returns a cudaError_t; check_launch() in runtime.h
// turns it into an Error. bf16 data is void*, all else as typed. Nothing is checked here.
//
// What changes from step to step lies in device memory, so that a captured graph can be replayed.
#pragma once

#include <cstdint>

#include "kernels/cuda/layout.h"

namespace deinfer::cuda {

using Stream = struct StreamTag*;  // a cudaStream_t

/// K and V of one layer: k[block, kv_head, position, head_width] and v[block, kv_head, head_width,
/// position], bf16. Elements of a head beyond head_dim are zero.
struct KvPool {
  void* k = nullptr;
  void* v = nullptr;
  int block_size = 16;
  int kv_heads = 0;
  int head_dim = 0;
  int head_width = 0;
};

/// cos and sin of the rotation of every token, [m, half] each.
struct Rotation {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int half = 0;  // head_dim / 2
};

/// What becomes of a product y[m, n] in fp32, its bias added.
enum class LinearEpilogue {
  kActivation,   // out = y, activations of `out_chunks`, padded rows included; or, where that is 0,
                 // out[m, n] bf16, rows ld apart
  kRelu,         // out = max(y, 0), likewise
  kGatedSilu,    // out = silu(y) * y2, likewise; y2 is the product of `second`
  kGatedGelu,    // out = gelu(y) * y2 in its tanh form
  kAdd,          // out[m, n] += y, fp32, rows ld apart
  kFloat,        // out[m, n] = y, fp32, rows ld apart; soft-capped
  kQuery,        // out[m, heads, head_width] = y, bf16
  kRotaryQuery,  // likewise, rotated; rows in the order of rotary_tiles()
  kKey,          // K of the tokens' slots
  kRotaryKey,    // likewise, rotated
  kValue,        // V of the tokens' slots
  kHeads,        // as kActivation, of heads that each have a part of x (LinearSegment::head_tiles);
                 // activations without the padding of heads' rows
};

/// A product x[m, k] W[n, k]^T.
struct LinearFactor {
  const void* w = nullptr;      // in the order of weight_offset(); or int8, of int8_offset()
  const void* x = nullptr;      // activations
  int chunks = 0;               // tiles of k
  int x_chunks = 0;             // tiles of columns from one row of tiles of x to the next
  const float* bias = nullptr;  // [rows of all tiles]; or null
  // [rows of all tiles], of int8 weights (pack_int8_weights); a launch has weights of one type.
  const float* scales = nullptr;
};

struct LinearSegment {
  LinearFactor first;
  LinearFactor second;  // of the gated epilogues
  LinearEpilogue epilogue = LinearEpilogue::kActivation;
  int n = 0;      // rows of W
  int tiles = 0;  // tiles of rows of W
  void* out = nullptr;
  int out_chunks = 0;
  // Of activations: row 0 is this column of out, and rows beyond so many are not stored.
  int out_col = 0;
  int out_rows = 1 << 30;
  std::int64_t ld = 0;
  float soft_cap = 0.0f;
  // Of kHeads: tiles of rows of a head (an even number); each head has its own `chunks` tiles of
  // columns of x, and the heads of a group have the same W.
  int head_tiles = 0;
  int group = 1;
};

/// Linears of the same m tokens that run side by side.
struct LinearLaunch {
  static constexpr int kMaxSegments = 3;
  LinearSegment segments[kMaxSegments];
  int num_segments = 0;
  int m = 0;
  int first_token = 0;  // of [0, m) that matters; what comes before is not stored
  int heads = 0;        // of kQuery and kRotaryQuery
  Rotation rotation;
  KvPool kv;
  const int* slots = nullptr;  // [m]: block * block_size + offset; -1: nowhere
};

/// A matrix of another program, bf16 [rows, cols], rows ld apart, becomes tiles; zero beyond it.
struct TileLaunch {
  const void* from = nullptr;
  std::int64_t ld = 0;
  int rows = 0;
  int cols = 0;
  int tiles = 0;   // of rows
  int chunks = 0;  // tiles of columns
  void* out = nullptr;
};
int launch_tile_weights(const TileLaunch& args, Stream stream);
int launch_tile_activations(const TileLaunch& args, Stream stream);
/// out[padded] = from[n] (bf16; null: zeros), and zeros.
int launch_widen(const void* from, int n, int padded, float* out, Stream stream);

/// Up to so many tokens, blocks share the sum over k of a few rows; beyond, they have many.
inline constexpr int kFewTokens = 64;

int launch_linear(const LinearLaunch& args, Stream stream);

/// Normalisation of rows: kind as NormKind of plan/norms.h (0 none, 1 RMS, 2 layer).
struct NormLaunch {
  const float* x = nullptr;  // [., n], rows ld apart
  std::int64_t ld = 0;
  const int* rows = nullptr;  // [m] rows of x; null: first_row, first_row + 1, ..
  int first_row = 0;          // of x without `rows`, and of what is written
  int m = 0;
  int n = 0;
  int kind = 0;
  float eps = 0.0f;
  const float* gain = nullptr;  // [n]
  const float* bias = nullptr;
  // Where ranks have parts of a row: what the others need to know of this part, its sum of squares,
  // or its mean and squared distances to it. The result then has the gain, is centred on the part's
  // mean, and nothing else.
  float* statistics = nullptr;  // [., 1 or 2], rows statistics_ld apart
  int statistics_ld = 0;
  // Of the whole row, which has `width` columns: its sum of squares (RMS), if it is known.
  const float* squares = nullptr;  // [.]
  int width = 0;
  void* out = nullptr;  // activations of out_chunks, zero beyond n; or
  int out_chunks = 0;
  float* out_float = nullptr;  // [., n], rows out_ld apart; or
  std::int64_t out_ld = 0;
  float* add_to = nullptr;  // [., n], rows ld apart: the result is added; or nothing
};
int launch_norm(const NormLaunch& args, Stream stream);

/// x[i, cols] (+)= scale * table[indices[i] + offset], or zero where the table has no such row.
struct EmbedLaunch {
  const int* indices = nullptr;
  int offset = 0;
  int first_row = 0;
  int m = 0;  // rows from first_row on
  int cols = 0;
  const void* table = nullptr;    // weights [table_rows, cols], as LinearFactor::w
  const float* scales = nullptr;  // of its rows, where it is int8
  int table_rows = 0;
  int chunks = 0;
  float scale = 1.0f;
  bool adds = false;
  float* x = nullptr;  // rows ld apart
  std::int64_t ld = 0;
};
int launch_embed(const EmbedLaunch& args, Stream stream);

/// cos[i, j], sin[i, j] = those of positions[i] * frequencies[j], times scaling.
struct RopeLaunch {
  const int* positions = nullptr;  // [m]
  int m = 0;
  const float* frequencies = nullptr;  // [half]
  int half = 0;
  float scaling = 1.0f;
  float* cos = nullptr;  // [m, half]
  float* sin = nullptr;
};
int launch_rope(const RopeLaunch& args, Stream stream);

/// Normalises q and k (RMS), rotates them, stores them, and v, as the epilogues do.
struct QkNormLaunch {
  const float* q = nullptr;  // [m, heads * head_dim]
  const float* k = nullptr;  // [m, kv_heads * head_dim]
  const float* v = nullptr;  // likewise; or null: it is stored
  int m = 0;
  int heads = 0;
  const float* query_gain = nullptr;  // [head_dim], or [heads * head_dim] where all_heads; null: no
                                      // norm
  const float* key_gain = nullptr;
  bool all_heads = false;  // one norm over all heads
  // Of all ranks' heads, where they are divided: sums of squares of q and k, over so many numbers.
  const float* squares = nullptr;  // [m, 2]
  int query_width = 0;
  int key_width = 0;
  float query_eps = 0.0f;
  float key_eps = 0.0f;
  Rotation rotation;
  void* out = nullptr;  // [m, heads, head_width]
  KvPool kv;
  const int* slots = nullptr;  // [m]
  // Where keys are latents, k is null; or, where all_heads, k[m, key_cols] of which 1 / rms is
  // wanted for the tokens' slots.
  float* key_scales = nullptr;
  int key_cols = 0;
};
int launch_qk_norm(const QkNormLaunch& args, Stream stream);

/// out[i, j] = f(gate[i, j]) * up[i, j], or max(up[i, j], 0): of products whose sums have
/// travelled.
struct ActivateLaunch {
  const float* gate = nullptr;  // [m, n], rows ld apart
  const float* up = nullptr;    // likewise
  std::int64_t ld = 0;
  int m = 0;
  int n = 0;
  LinearEpilogue kind = LinearEpilogue::kRelu;  // or one of the gated ones
  void* out = nullptr;                          // activations
  int out_chunks = 0;
};
int launch_activate(const ActivateLaunch& args, Stream stream);

/// Rows of one sequence in the batch; the KV of all positions before is cached.
struct AttentionSequence {
  int first_row = 0;
  int num_rows = 0;
  int first_position = 0;
  int table = 0;  // place of its block table in the pool of tables
};

/// What one warp does for every kv head: 16 query rows (token and head of the group, tokens first)
/// of a sequence, over KV splits. `partial` >= 0: it leaves a state per split, kv head and row from
/// that row of the partial states on; else it does all splits and writes the result.
struct AttentionTask {
  int sequence = 0;
  int tile = 0;
  int first_split = 0;
  int num_splits = 0;
  int partial = -1;
};

/// What attention reads of a step, in device memory.
struct AttentionStep {
  const int* num_tasks = nullptr;
  const int* num_combines = nullptr;
  const AttentionTask* tasks = nullptr;
  const AttentionTask* combines = nullptr;  // tiles whose splits are to be combined
  const AttentionSequence* sequences = nullptr;
  const int* tables = nullptr;
};

struct AttentionLaunch {
  AttentionStep step;
  const void* q = nullptr;  // [m, heads, head_width]
  KvPool kv;
  int heads = 0;
  int window = 0;  // positions a token sees, itself included; 0: all
  float scale = 1.0f;
  float soft_cap = 0.0f;
  float* partial_sums = nullptr;   // [partial rows, head_width]
  float* partial_stats = nullptr;  // [partial rows, 2]
  void* out = nullptr;             // activations [m, heads * head_dim], or rows
  int out_chunks = 0;              // 0: rows
  int blocks = 0;                  // of the grid: what is there to do is known on the device only
};
int launch_attention(const AttentionLaunch& args, Stream stream);

/// Writes k and v, bf16 [m, kv_heads * head_dim] with rows apart as said, to slots[m] of the pool;
/// nothing for slots outside [0, places).
struct KvWriteLaunch {
  const void* k = nullptr;
  const void* v = nullptr;
  std::int64_t k_ld = 0;
  std::int64_t v_ld = 0;
  int m = 0;
  const std::int64_t* slots = nullptr;
  std::int64_t places = 0;
  KvPool kv;
};
int launch_kv_write(const KvWriteLaunch& args, Stream stream);

/// out[m, heads, head_width] = q[m, heads * head_dim], rows ld apart, and zeros.
struct PadHeadsLaunch {
  const void* q = nullptr;
  std::int64_t ld = 0;
  int m = 0;
  int heads = 0;
  int head_dim = 0;
  int head_width = 0;
  void* out = nullptr;
};
int launch_pad_heads(const PadHeadsLaunch& args, Stream stream);

/// Divides attention into tasks as CudaStep does, from lists in device memory: sequence s has the
/// rows query_starts[s] .. query_starts[s + 1] and its block table from s * table_stride on.
struct AttentionPlanLaunch {
  const int* query_starts = nullptr;  // [num_sequences + 1]
  const int* lengths = nullptr;       // [num_sequences]
  int num_sequences = 0;
  int table_stride = 0;
  int group = 0;
  int kv_heads = 0;
  int window = 0;
  int parallel_warps = 0;      // that attention should have work for
  int partial_rows = 0;        // room for states of splits
  int* first_tiles = nullptr;  // [num_sequences + 1]
  int* counts = nullptr;       // num_tasks, num_combines
  AttentionTask* tasks = nullptr;
  AttentionTask* combines = nullptr;
  AttentionSequence* sequences = nullptr;
};
int launch_attention_plan(const AttentionPlanLaunch& args, Stream stream);

/// The largest logit of a part of the vocabulary.
struct RankCandidate {
  float value;
  int token;
};

/// tokens[i] = the place of the largest of logits[i, vocabulary], the lowest of equal ones; NaN is
/// never the largest.
struct ArgmaxLaunch {
  const float* logits = nullptr;
  int rows = 0;
  int vocabulary = 0;
  int* tokens = nullptr;                // or
  RankCandidate* candidates = nullptr;  // [rows], of logits of the tokens from first_token on
  int first_token = 0;
};
int launch_argmax(const ArgmaxLaunch& args, Stream stream);

// The driver may load a kernel at its first launch, and waits for the device to do it: for ever,
// where a kernel of another stream waits for that very launch. These load a file's kernels now.
int load_attention_kernels();
int load_exchange_kernels();
int load_latent_kernels();
int load_linear_kernels();
int load_row_kernels();
int load_sampling_kernels();

}  // namespace deinfer::cuda

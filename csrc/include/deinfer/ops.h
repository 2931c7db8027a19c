// deinfer/ops.h: the operations by themselves, for programs whose tensors are their own.
//
//   deinfer::OpExecutor ops;
//   std::vector<deinfer::LinearWeights> linear{{v, u, bias}};            // TensorViews
//   void* memory = aligned_alloc(64, deinfer::packed_bytes(linear, deinfer::DType::kBFloat16));
//   ops.pack(linear, deinfer::DType::kBFloat16, memory, bytes, threads);
//   ops.lowrank_linear(x, deinfer::PackedLinears(memory, bytes), y, threads);
//
// A linear is low-rank, y = U (V x) + b with V[r, k] and U[n, r], or dense, y = W x + b. Matrices
// are row-major with any row stride. Activations, float32 or bfloat16, have the dtype of the packed
// weights; sums are float32, z = V x is rounded once to the dtype of the activations, outputs once.
// A row's result has the same bits alone and among any others, with any number of threads.
//
// Bad input throws Error(kInvalidArgument) naming the operand and its value; nothing is written
// then. All memory is the caller's and only used during the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "deinfer/error.h"
#include "deinfer/export.h"
#include "deinfer/tensor.h"

namespace deinfer {
inline namespace DEINFER_ABI {

/// The weights of one linear: float32, bfloat16 or float16.
struct LinearWeights {
  TensorView v;     // [r, k]; data null: the linear is dense
  TensorView u;     // [n, r], or W[n, k] of a dense linear
  TensorView bias;  // [1, n]; data null: none
};

/// Bytes that pack() writes for one to three linears that read the same input.
DEINFER_API std::size_t packed_bytes(std::span<const LinearWeights> linears, DType dtype);

/// Linears as pack() has left them in memory, which must outlive this. The bytes hold no addresses:
/// they may be moved or stored, and read by a deinfer with the same layout version.
class DEINFER_API PackedLinears {
 public:
  /// Of the bytes at `memory`, 64-byte aligned. Checks the header, which says everything about the
  /// rest; throws kInvalidArgument when these are not packed linears, are damaged, or of another
  /// layout version.
  PackedLinears(const void* memory, std::size_t bytes);

  int count() const;
  DType dtype() const;
  std::int64_t in_features() const;            // k
  std::int64_t out_features(int index) const;  // n
  std::int64_t rank(int index) const;          // r; 0: dense
  std::int64_t parameters() const;             // of all factors
  const void* memory() const { return memory_; }

 private:
  const void* memory_;
};

/// K and V of one attention layer, in blocks of `block_size` tokens (a multiple of 16); an element
/// (block, head, token, d) lies in
///   k[num_blocks, kv_heads, block_size / 16, head_dim, 16] at (block, head, token / 16, d, token %
///   16), v[num_blocks, kv_heads, block_size, head_dim].
struct PagedCache {
  void* k = nullptr;
  void* v = nullptr;
  DType dtype = DType::kFloat32;  // or kBFloat16
  std::int64_t num_blocks = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;
};

/// Sequences whose queries are attended: the rows [query_starts[s], query_starts[s + 1]) are the
/// last tokens of sequence s, whose K and V, those of these tokens included, lie in the cache:
/// position p in block block_table[s, p / block_size].
struct PagedSequences {
  std::span<const std::int32_t> query_starts;  // [sequences + 1], from 0 to the rows of q
  std::span<const std::int32_t> lengths;       // [sequences], tokens in the cache
  const std::int32_t* block_table = nullptr;   // [sequences, table_cols]
  std::int64_t table_cols = 0;
  std::int64_t table_stride = 0;  // elements from row to row
};

/// Runs operations; owns threads and scratch memory, which grow with what is asked for. Any thread
/// may call it: calls take turns. `threads` is the most that a call may use, the calling one
/// included; small ones use one. Threads that have nothing to do sleep after some microseconds. To
/// be used in the process that created it, not in a forked one.
class DEINFER_API OpExecutor {
 public:
  OpExecutor();
  ~OpExecutor();
  OpExecutor(const OpExecutor&) = delete;
  OpExecutor& operator=(const OpExecutor&) = delete;

  /// Packs one to three linears with the same k into `memory`, 64-byte aligned, of packed_bytes().
  /// bfloat16 rounds to nearest even.
  void pack(std::span<const LinearWeights> linears, DType dtype, void* memory, std::size_t bytes,
            int threads);

  /// out[m, n] = linear(x[m, k]) of one packed linear.
  void lowrank_linear(const TensorView& x, const PackedLinears& linear,
                      const MutableTensorView& out, int threads);

  /// out[m, n] = silu(gate(x[m, k])) * up(x) of two packed linears, gate and up.
  void lowrank_gated_mlp(const TensorView& x, const PackedLinears& gate_up,
                         const MutableTensorView& out, int threads);

  /// outs[i][m, n_i] = linear_i(x[m, k]) of three packed linears, such as q, k and v: all V in one
  /// pass over x, then all U.
  void lowrank_qkv(const TensorView& x, const PackedLinears& linears,
                   std::span<const MutableTensorView> outs, int threads);

  /// Writes k and v[m, kv_heads * head_dim], float32 or bfloat16, to the places slots[m] (block *
  /// block_size + token within it; -1: nowhere) of the cache. Slots are distinct.
  void write_kv(const TensorView& k, const TensorView& v, std::span<const std::int64_t> slots,
                const PagedCache& cache, int threads);

  /// out[m, heads * head_dim] = softmax(scale q K^T) V of q[m, heads * head_dim], causal; float32
  /// or bfloat16, out as q. kv_heads divides heads, at most 64 heads share one of K and V. A token
  /// sees the last `window` positions, itself included; 0: all.
  void paged_attention(const TensorView& q, const PagedCache& cache,
                       const PagedSequences& sequences, float scale, int window,
                       const MutableTensorView& out, int threads);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace DEINFER_ABI
}  // namespace deinfer

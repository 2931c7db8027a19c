// deinfer/cuda_ops.h: the operations of ops.h on memory of a CUDA device, in bfloat16, for programs
// whose tensors and streams are their own.
//
//   std::vector<deinfer::CudaLinearShape> shapes{{n, r}};
//   deinfer::CudaPackedLinears packed{memory, deinfer::cuda_packed_bytes(k, shapes), k, shapes};
//   deinfer::cuda_pack(linears, packed, on);                    // on = {device, stream}
//   deinfer::cuda_lowrank_linears(x, packed, outs, workspace, bytes, on);
//
// Everything is put into the stream and nothing waited for: calls may be captured into graphs. All
// views and memory are the device's, 16-byte aligned where they are packed or a workspace, and must
// stay until the work is done. A row's result has the same bits alone and among any others.
//
// Bad input throws Error(kInvalidArgument) naming the operand and its value, other dtypes than
// bfloat16 and builds without CUDA Error(kUnsupported); nothing is started then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "deinfer/error.h"
#include "deinfer/export.h"
#include "deinfer/ops.h"
#include "deinfer/tensor.h"

namespace deinfer {
inline namespace DEINFER_ABI {

/// A stream (cudaStream_t) of a device.
struct CudaStream {
  int device = 0;
  void* stream = nullptr;
};

struct CudaLinearShape {
  std::int64_t n = 0;     // outputs
  std::int64_t rank = 0;  // 0: dense
};

/// One to three linears that read the same input, as cuda_pack() leaves them. The bytes do not say
/// what they are: shapes are to be those that were packed.
struct CudaPackedLinears {
  void* memory = nullptr;
  std::size_t bytes = 0;  // cuda_packed_bytes()
  std::int64_t k = 0;     // inputs
  std::span<const CudaLinearShape> shapes;
};

DEINFER_API std::size_t cuda_packed_bytes(std::int64_t k, std::span<const CudaLinearShape> shapes);

/// Writes bfloat16 weights of these shapes to `packed`. Layouts may differ between versions.
DEINFER_API void cuda_pack(std::span<const LinearWeights> linears, const CudaPackedLinears& packed,
                           const CudaStream& on);

/// Scratch that the operations below need for x of m rows.
DEINFER_API std::size_t cuda_workspace_bytes(std::int64_t m, const CudaPackedLinears& packed);

/// outs[i][m, n_i] = linear_i(x[m, k]): all V in one pass over x, then all U.
DEINFER_API void cuda_lowrank_linears(const TensorView& x, const CudaPackedLinears& packed,
                                      std::span<const MutableTensorView> outs, void* workspace,
                                      std::size_t workspace_bytes, const CudaStream& on);

/// out[m, n] = silu(gate(x[m, k])) * up(x) of two packed linears, gate and up.
DEINFER_API void cuda_lowrank_gated_mlp(const TensorView& x, const CudaPackedLinears& gate_up,
                                        const MutableTensorView& out, void* workspace,
                                        std::size_t workspace_bytes, const CudaStream& on);

/// Elements from one head to the next in a cache: head_dim, padded to what kernels are compiled
/// for. Throws kUnsupported for more than 256.
DEINFER_API int cuda_head_width(std::int64_t head_dim);

/// K and V of one attention layer, bfloat16, in blocks of `block_size` tokens (a multiple of 16):
///   k[num_blocks, kv_heads, block_size, width], v[num_blocks, kv_heads, width, block_size]
/// with width = cuda_head_width(head_dim); zero beyond head_dim.
struct CudaPagedCache {
  void* k = nullptr;
  void* v = nullptr;
  std::int64_t num_blocks = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;
};

/// As PagedSequences, with lists that the device alone has. So nothing in them is checked, and
/// whatever does not fit together reads or writes where it should not.
struct CudaPagedSequences {
  const std::int32_t* query_starts = nullptr;  // [count + 1]
  const std::int32_t* lengths = nullptr;       // [count]
  const std::int32_t* block_table = nullptr;   // [count, .]
  std::int64_t table_stride = 0;
  std::int64_t count = 0;
};

/// Writes k and v[m, kv_heads * head_dim] to the places slots[m] of the cache; slots outside of it
/// are skipped.
DEINFER_API void cuda_write_kv(const TensorView& k, const TensorView& v, const std::int64_t* slots,
                               const CudaPagedCache& cache, const CudaStream& on);

/// Scratch that cuda_paged_attention() needs for q[m, heads * head_dim].
DEINFER_API std::size_t cuda_attention_workspace_bytes(std::int64_t m, int heads,
                                                       const CudaPagedCache& cache,
                                                       std::int64_t sequences);

/// As OpExecutor::paged_attention(). The rows of out must be contiguous.
DEINFER_API void cuda_paged_attention(const TensorView& q, const CudaPagedCache& cache,
                                      const CudaPagedSequences& sequences, float scale, int window,
                                      const MutableTensorView& out, void* workspace,
                                      std::size_t workspace_bytes, const CudaStream& on);

}  // namespace DEINFER_ABI
}  // namespace deinfer

// deinfer/cuda_ops.h: the linears of ops.h on memory of a CUDA device, in bfloat16, for programs
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

}  // namespace DEINFER_ABI
}  // namespace deinfer

// torch's CUDA tensors as deinfer/cuda_ops.h takes them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <span>
#include <vector>

#include "deinfer/cuda_ops.h"
#include "torch/tensors.h"

namespace deinfer::torch_ops {

/// The stream that torch uses now on the device of a tensor. That device stays the thread's as long
/// as this lives.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& tensor);
  const CudaStream& get() const { return on_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CudaStream on_;
};

/// New memory on the device of `like`, uint8 [bytes].
Tensor empty_bytes(const Tensor& like, std::size_t bytes);

/// bfloat16 weights as lowrank_pack leaves them on the device of `like`, uint8 [bytes].
Tensor cuda_pack_linears(std::span<const LinearWeights> linears, const Tensor& like);

/// The shapes of packed linears, of which device memory does not tell without waiting for it.
std::vector<CudaLinearShape> cuda_shapes(std::initializer_list<std::int64_t> features,
                                         const std::vector<std::int64_t>& ranks);

/// outs = the linears of x, or (gated) the one output of a gated MLP, on torch's current stream.
void cuda_run_linears(const Tensor& x, const Tensor& packed,
                      std::span<const CudaLinearShape> shapes, std::span<Tensor> outs, bool gated);

}  // namespace deinfer::torch_ops

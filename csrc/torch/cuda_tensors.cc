// Streams of torch are asked of libtorch_cuda, which this library cannot be linked with: it is the
// same for torch without CUDA.
#include "torch/cuda_tensors.h"

#include <dlfcn.h>

namespace deinfer::torch_ops {
namespace {

using GetStream = AOTITorchError (*)(std::int32_t device, void** stream);

/// aoti_torch_get_current_cuda_stream of inductor/aoti_torch/c/shim.h.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol =
      library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (symbol == nullptr)
    torch_ops::fail("this torch has no CUDA streams: libtorch_cuda.so is not loaded");
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

CurrentStream::CurrentStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  static const GetStream get_stream = find_get_stream();
  on_.device = tensor.get_device_index();
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(on_.device, &on_.stream));
}

Tensor empty_bytes(const Tensor& like, std::size_t bytes) {
  const auto size = static_cast<std::int64_t>(bytes);
  return torch::stable::new_empty(like, {&size, 1}, ScalarType::Byte);
}

Tensor cuda_pack_linears(std::span<const LinearWeights> linears, const Tensor& like) {
  std::vector<CudaLinearShape> shapes;
  for (const LinearWeights& linear : linears) {
    shapes.push_back({linear.u.rows, linear.v.data != nullptr ? linear.v.rows : 0});
  }
  const bool low_rank = shapes.front().rank > 0;
  const std::int64_t k = low_rank ? linears.front().v.cols : linears.front().u.cols;
  const std::size_t bytes = cuda_packed_bytes(k, shapes);
  Tensor packed = empty_bytes(like, bytes);
  const CurrentStream stream(like);
  cuda_pack(linears, {packed.mutable_data_ptr(), bytes, k, shapes}, stream.get());
  return packed;
}

std::vector<CudaLinearShape> cuda_shapes(std::initializer_list<std::int64_t> features,
                                         const std::vector<std::int64_t>& ranks) {
  if (ranks.size() != features.size()) {
    torch_ops::fail("ranks must be those of the " + std::to_string(features.size()) +
                    " linears (0: dense) where packed weights are on a CUDA device, not " +
                    std::to_string(ranks.size()) + " numbers");
  }
  std::vector<CudaLinearShape> shapes;
  for (std::int64_t n : features) shapes.push_back({n, ranks[shapes.size()]});
  return shapes;
}

void cuda_run_linears(const Tensor& x, const Tensor& packed,
                      std::span<const CudaLinearShape> shapes, std::span<Tensor> outs, bool gated) {
  check_like(packed, x, ScalarType::Byte, "packed");
  std::optional<Tensor> holder;
  const TensorView rows = rows_of(x, "x", holder);
  const CudaPackedLinears linears = {packed.mutable_data_ptr(),
                                     static_cast<std::size_t>(packed.numel()), rows.cols, shapes};
  std::vector<MutableTensorView> views;
  for (Tensor& out : outs) views.push_back(rows_of_output(out));
  const std::size_t bytes = cuda_workspace_bytes(rows.rows, linears);
  Tensor workspace = empty_bytes(x, bytes);
  const CurrentStream stream(x);
  if (gated) {
    cuda_lowrank_gated_mlp(rows, linears, views[0], workspace.mutable_data_ptr(), bytes,
                           stream.get());
  } else {
    cuda_lowrank_linears(rows, linears, views, workspace.mutable_data_ptr(), bytes, stream.get());
  }
}

}  // namespace deinfer::torch_ops

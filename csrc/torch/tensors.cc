#include "torch/tensors.h"

#include <pthread.h>

#include <stdexcept>

namespace deinfer::torch_ops {
namespace {

OpExecutor* current = nullptr;

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: fail(std::string(name) + " must be float32 or bfloat16");
  }
}

void check_scalar_type(const Tensor& tensor, ScalarType type, const char* name) {
  if (tensor.scalar_type() != type) {
    fail(std::string(name) + " is " + torch::headeronly::toString(tensor.scalar_type()) +
         " where " + torch::headeronly::toString(type) + " is wanted");
  }
}

std::int64_t leading(const Tensor& tensor) {
  std::int64_t rows = 1;
  for (std::int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

}  // namespace

OpExecutor& executor() {
  // The threads of the parent are not in a forked process.
  static const bool ready = [] {
    current = new OpExecutor();
    pthread_atfork(nullptr, nullptr, [] { current = new OpExecutor(); });
    return true;
  }();
  static_cast<void>(ready);
  return *current;
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

bool has_kernels(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::BFloat16 || (type == ScalarType::Float && !tensor.is_cuda());
}

void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  if (!tensor.is_cpu()) fail(std::string(name) + " must be on the CPU, as the other tensors");
  check_scalar_type(tensor, type, name);
}

void check_like(const Tensor& tensor, const Tensor& like, ScalarType type, const char* name) {
  if (!like.is_cuda()) return check_type(tensor, type, name);
  const auto device = like.get_device_index();
  if (!tensor.is_cuda() || tensor.get_device_index() != device) {
    fail(std::string(name) + " must be on cuda:" + std::to_string(device) +
         ", as the other tensors");
  }
  check_scalar_type(tensor, type, name);
}

TensorView rows_of(const Tensor& tensor, const char* name, std::optional<Tensor>& holder) {
  const std::int64_t dims = tensor.dim();
  if (dims < 1) fail(std::string(name) + " must have a dimension, not be a number");
  const std::int64_t cols = tensor.size(dims - 1);
  const bool strided = dims == 2 && tensor.stride(1) == 1 && tensor.stride(0) >= cols;
  if (!strided && !tensor.is_contiguous()) holder = torch::stable::contiguous(tensor);
  const Tensor& rows = holder ? *holder : tensor;
  return {rows.const_data_ptr(), dtype_of(tensor, name), leading(tensor), cols,
          strided ? tensor.stride(0) : cols};
}

MutableTensorView rows_of_output(const Tensor& tensor) {
  const std::int64_t cols = tensor.size(tensor.dim() - 1);
  return {tensor.mutable_data_ptr(), dtype_of(tensor, "the output"), leading(tensor), cols, cols};
}

Tensor empty_rows(const Tensor& x, std::int64_t cols) {
  constexpr std::size_t kMost = 8;
  const auto sizes = x.sizes();
  if (sizes.size() <= kMost) {
    std::int64_t shape[kMost];
    for (std::size_t i = 0; i + 1 < sizes.size(); ++i) shape[i] = sizes[i];
    shape[sizes.size() - 1] = cols;
    return torch::stable::new_empty(x, {shape, sizes.size()});
  }
  std::vector<std::int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = cols;
  return torch::stable::new_empty(x, shape);
}

void fail(const std::string& message) { throw std::runtime_error(message); }

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t extent : tensor.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  }
  return text + "]";
}

}  // namespace deinfer::torch_ops

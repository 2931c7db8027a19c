// torch's stable tensors as deinfer's views.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "deinfer/ops.h"

namespace deinfer::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The library's executor. Its threads outlive static destructors: it is never destroyed. A forked
/// process gets one of its own.
OpExecutor& executor();

/// torch's own setting, torch.set_num_threads().
int num_threads();

/// Whether deinfer's kernels take tensors of the element type and device of this one; others go to
/// aten.
bool has_kernels(const Tensor& tensor);

/// Throws naming the tensor unless it is on the CPU and of the type.
void check_type(const Tensor& tensor, ScalarType type, const char* name);

/// The same, unless it is on the device of `like`.
void check_like(const Tensor& tensor, const Tensor& like, ScalarType type, const char* name);

/// A tensor [..., cols] as a matrix; `holder` keeps what had to be copied to be one.
TensorView rows_of(const Tensor& tensor, const char* name, std::optional<Tensor>& holder);

/// A contiguous tensor as a matrix of its last dimension.
MutableTensorView rows_of_output(const Tensor& tensor);

/// A new tensor like x, with the last dimension `cols`.
Tensor empty_rows(const Tensor& x, std::int64_t cols);

[[noreturn]] void fail(const std::string& message);

std::string shape_text(const Tensor& tensor);

}  // namespace deinfer::torch_ops

// Element types and the non-owning view in which tensors cross the library's boundaries.
// C++17, so that CUDA sources may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "deinfer/export.h"

namespace deinfer {
inline namespace DEINFER_ABI {

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt8 };

/// Bytes per element.
constexpr std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kInt8: return 1;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kFloat32:
    case DType::kInt32: return 4;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kInt32: return "int32";
    case DType::kInt8: return "int8";
  }
  return "unknown";
}

/// A borrowed matrix data[rows, cols], row stride in elements. Never owns, never outlives its
/// owner.
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;

  /// First byte of a row.
  const std::byte* row(std::int64_t r) const {
    return static_cast<const std::byte*>(data) +
           static_cast<std::size_t>(r * row_stride) * dtype_size(dtype);
  }
};

/// The same of a matrix that is written. Rows do not overlap.
struct MutableTensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;
};

}  // namespace DEINFER_ABI
}  // namespace deinfer

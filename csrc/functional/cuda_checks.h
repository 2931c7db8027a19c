// What the operations on CUDA memory ask of their operands.
#pragma once

#include "base/check.h"
#include "deinfer/cuda_ops.h"
#include "kernels/cuda/runtime.h"

namespace deinfer {

inline void check_memory(const char* name, const void* memory, std::size_t bytes,
                         std::size_t wanted) {
  check_argument(bytes >= wanted, name, " has ", bytes, " bytes, these shapes need ", wanted);
  check_argument(reinterpret_cast<std::uintptr_t>(memory) % 16 == 0, name,
                 " must lie at a multiple of 16 bytes, not at ", memory);
}

inline void check_bfloat16(const char* name, DType dtype) {
  if (dtype == DType::kBFloat16) return;
  fail(ErrorCode::kUnsupported, name, " is ", dtype_name(dtype),
       ": on CUDA devices the kernels are bfloat16 only");
}

inline cuda::Stream stream_of(const CudaStream& on) {
  return reinterpret_cast<cuda::Stream>(on.stream);
}

}  // namespace deinfer

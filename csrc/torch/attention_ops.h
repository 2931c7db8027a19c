// The implementations of the ops on the paged cache, for CPU and CUDA tensors; their schemas stand
// in library.cc.
#pragma once

#include "torch/tensors.h"

namespace deinfer::torch_ops {

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slots);

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& block_table, const Tensor& query_starts, const Tensor& lengths,
                       double scale, std::int64_t window);

}  // namespace deinfer::torch_ops

// The implementations of the ops on linears, for CPU and CUDA tensors; their schemas stand in
// library.cc.
#pragma once

#include <tuple>

#include "torch/tensors.h"

namespace deinfer::torch_ops {

Tensor lowrank_pack(std::vector<std::optional<Tensor>> v, std::vector<Tensor> u,
                    std::vector<std::optional<Tensor>> bias);

Tensor lowrank_linear(const Tensor& x, const Tensor& v, const Tensor& u,
                      const std::optional<Tensor>& bias);
Tensor lowrank_linear_packed(const Tensor& x, const Tensor& packed, std::int64_t out_features,
                             std::vector<std::int64_t> ranks);

Tensor lowrank_gated_mlp(const Tensor& x, const std::optional<Tensor>& gate_v, const Tensor& gate_u,
                         const std::optional<Tensor>& up_v, const Tensor& up_u,
                         const std::optional<Tensor>& gate_bias,
                         const std::optional<Tensor>& up_bias);
Tensor lowrank_gated_mlp_packed(const Tensor& x, const Tensor& packed, std::int64_t out_features,
                                std::vector<std::int64_t> ranks);

std::tuple<Tensor, Tensor, Tensor> lowrank_qkv(const Tensor& x, const std::optional<Tensor>& q_v,
                                               const Tensor& q_u, const std::optional<Tensor>& k_v,
                                               const Tensor& k_u, const std::optional<Tensor>& v_v,
                                               const Tensor& v_u,
                                               const std::optional<Tensor>& q_bias,
                                               const std::optional<Tensor>& k_bias,
                                               const std::optional<Tensor>& v_bias);
std::tuple<Tensor, Tensor, Tensor> lowrank_qkv_packed(const Tensor& x, const Tensor& packed,
                                                      std::int64_t q_features,
                                                      std::int64_t k_features,
                                                      std::int64_t v_features,
                                                      std::vector<std::int64_t> ranks);

}  // namespace deinfer::torch_ops

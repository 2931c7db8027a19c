// The linears as custom ops. Unpacked forms pack their weights for the one call, so that there is
// one implementation; packed forms borrow the packed tensor's memory. CPU and CUDA tensors both
// come here.
#include "torch/linear_ops.h"

#include <array>
#include <span>
#include <vector>

#include "torch/cuda_tensors.h"

namespace deinfer::torch_ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

/// The weights of one linear as views; tensors that had to be copied live here too.
class Weights {
 public:
  /// All have the type and the device of `like`.
  Weights(const OptionalTensor& v, const Tensor& u, const OptionalTensor& bias,
          const Tensor& like) {
    if (v) weights_.v = matrix(*v, like, "v", v_);
    weights_.u = matrix(u, like, v ? "u" : "w", u_);
    if (!bias) return;
    check_like(*bias, like, like.scalar_type(), "bias");
    if (bias->dim() != 1) torch_ops::fail("bias has shape " + shape_text(*bias) + ", not [n]");
    weights_.bias = rows_of(*bias, "bias", bias_);
  }
  const LinearWeights& views() const { return weights_; }

 private:
  static TensorView matrix(const Tensor& tensor, const Tensor& like, const char* name,
                           std::optional<Tensor>& holder) {
    check_like(tensor, like, like.scalar_type(), name);
    if (tensor.dim() != 2) {
      torch_ops::fail(std::string(name) + " has shape " + shape_text(tensor) +
                      ", not 2 dimensions");
    }
    return rows_of(tensor, name, holder);
  }

  std::optional<Tensor> v_, u_, bias_;  // copies
  LinearWeights weights_;
};

Tensor pack(std::span<const LinearWeights> linears, const Tensor& like) {
  if (like.is_cuda()) return cuda_pack_linears(linears, like);
  const DType dtype = linears.front().u.dtype;
  const auto bytes = static_cast<std::int64_t>(packed_bytes(linears, dtype));
  Tensor packed = torch::stable::empty({&bytes, 1}, ScalarType::Byte);
  executor().pack(linears, dtype, packed.mutable_data_ptr(), static_cast<std::size_t>(bytes),
                  num_threads());
  return packed;
}

PackedLinears packed_linears(const Tensor& packed) {
  check_type(packed, ScalarType::Byte, "packed");
  if (packed.dim() != 1 || !packed.is_contiguous()) {
    torch_ops::fail("packed has shape " + shape_text(packed) + ", not [bytes] without gaps");
  }
  return {packed.const_data_ptr(), static_cast<std::size_t>(packed.numel())};
}

void check_outputs(const PackedLinears& packed, std::initializer_list<std::int64_t> features,
                   const std::vector<std::int64_t>& ranks) {
  if (!ranks.empty()) {
    bool same = static_cast<int>(ranks.size()) == packed.count();
    for (int i = 0; same && i < packed.count(); ++i) {
      same = ranks[static_cast<std::size_t>(i)] == packed.rank(i);
    }
    if (!same) torch_ops::fail("ranks are not those of the packed weights");
  }
  int index = 0;
  for (std::int64_t n : features) {
    if (index < packed.count() && packed.out_features(index) != n) {
      torch_ops::fail("linear " + std::to_string(index) + " of the packed weights has " +
                      std::to_string(packed.out_features(index)) + " outputs, not " +
                      std::to_string(n));
    }
    ++index;
  }
}

/// aten::linear by the dispatcher, for element types without kernels.
Tensor aten_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor aten_lowrank(const Tensor& x, const OptionalTensor& v, const Tensor& u,
                    const OptionalTensor& bias) {
  return v ? aten_linear(aten_linear(x, *v, std::nullopt), u, bias) : aten_linear(x, u, bias);
}

/// 0: dense.
std::int64_t rank_of(const OptionalTensor& v) { return v ? v->size(0) : 0; }

template <std::size_t kArgs>
Tensor aten_call(const char* name, const char* overload, std::array<StableIValue, kArgs> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor lowrank_pack(std::vector<OptionalTensor> v, std::vector<Tensor> u,
                    std::vector<OptionalTensor> bias) {
  if (u.empty() || v.size() != u.size() || bias.size() != u.size()) {
    torch_ops::fail("v, u and bias must be lists of the same one to three linears, not of " +
                    std::to_string(v.size()) + ", " + std::to_string(u.size()) + " and " +
                    std::to_string(bias.size()));
  }
  const Tensor& like = u.front();
  if (!has_kernels(like)) {
    torch_ops::fail(std::string(like.is_cuda()
                                    ? "packed weights on a CUDA device are bfloat16, not "
                                    : "packed weights are float32 or bfloat16, not ") +
                    torch::headeronly::toString(like.scalar_type()));
  }
  std::vector<Weights> weights;
  std::vector<LinearWeights> views;
  for (std::size_t i = 0; i < u.size(); ++i) {
    weights.emplace_back(v[i], u[i], bias[i], like);
    views.push_back(weights.back().views());
  }
  return pack(views, like);
}

Tensor lowrank_linear_packed(const Tensor& x, const Tensor& packed, std::int64_t out_features,
                             std::vector<std::int64_t> ranks) {
  if (x.is_cuda()) {
    Tensor out = empty_rows(x, out_features);
    cuda_run_linears(x, packed, cuda_shapes({out_features}, ranks), std::span(&out, 1), false);
    return out;
  }
  const PackedLinears linear = packed_linears(packed);
  check_outputs(linear, {out_features}, ranks);
  std::optional<Tensor> holder;
  const TensorView rows = rows_of(x, "x", holder);
  Tensor out = empty_rows(x, out_features);
  executor().lowrank_linear(rows, linear, rows_of_output(out), num_threads());
  return out;
}

Tensor lowrank_gated_mlp_packed(const Tensor& x, const Tensor& packed, std::int64_t out_features,
                                std::vector<std::int64_t> ranks) {
  if (x.is_cuda()) {
    Tensor out = empty_rows(x, out_features);
    cuda_run_linears(x, packed, cuda_shapes({out_features, out_features}, ranks),
                     std::span(&out, 1), true);
    return out;
  }
  const PackedLinears linears = packed_linears(packed);
  check_outputs(linears, {out_features, out_features}, ranks);
  std::optional<Tensor> holder;
  const TensorView rows = rows_of(x, "x", holder);
  Tensor out = empty_rows(x, out_features);
  executor().lowrank_gated_mlp(rows, linears, rows_of_output(out), num_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> lowrank_qkv_packed(const Tensor& x, const Tensor& packed,
                                                      std::int64_t q_features,
                                                      std::int64_t k_features,
                                                      std::int64_t v_features,
                                                      std::vector<std::int64_t> ranks) {
  if (x.is_cuda()) {
    std::array<Tensor, 3> outs = {empty_rows(x, q_features), empty_rows(x, k_features),
                                  empty_rows(x, v_features)};
    cuda_run_linears(x, packed, cuda_shapes({q_features, k_features, v_features}, ranks), outs,
                     false);
    return {outs[0], outs[1], outs[2]};
  }
  const PackedLinears linears = packed_linears(packed);
  check_outputs(linears, {q_features, k_features, v_features}, ranks);
  std::optional<Tensor> holder;
  const TensorView rows = rows_of(x, "x", holder);
  Tensor q = empty_rows(x, q_features);
  Tensor k = empty_rows(x, k_features);
  Tensor v = empty_rows(x, v_features);
  const std::array<MutableTensorView, 3> outs = {rows_of_output(q), rows_of_output(k),
                                                 rows_of_output(v)};
  executor().lowrank_qkv(rows, linears, outs, num_threads());
  return {q, k, v};
}

Tensor lowrank_linear(const Tensor& x, const Tensor& v, const Tensor& u,
                      const OptionalTensor& bias) {
  if (!has_kernels(x)) return aten_lowrank(x, v, u, bias);
  const Weights weights(v, u, bias, x);
  return lowrank_linear_packed(x, pack(std::span(&weights.views(), 1), x), u.size(0), {rank_of(v)});
}

Tensor lowrank_gated_mlp(const Tensor& x, const OptionalTensor& gate_v, const Tensor& gate_u,
                         const OptionalTensor& up_v, const Tensor& up_u,
                         const OptionalTensor& gate_bias, const OptionalTensor& up_bias) {
  if (!has_kernels(x)) {
    using torch::stable::detail::from;
    Tensor gate =
        aten_call<1>("aten::silu", "", {from(aten_lowrank(x, gate_v, gate_u, gate_bias))});
    return aten_call<2>("aten::mul", "Tensor",
                        {from(gate), from(aten_lowrank(x, up_v, up_u, up_bias))});
  }
  const Weights gate(gate_v, gate_u, gate_bias, x);
  const Weights up(up_v, up_u, up_bias, x);
  const std::array<LinearWeights, 2> views = {gate.views(), up.views()};
  return lowrank_gated_mlp_packed(x, pack(views, x), gate_u.size(0),
                                  {rank_of(gate_v), rank_of(up_v)});
}

std::tuple<Tensor, Tensor, Tensor> lowrank_qkv(const Tensor& x, const OptionalTensor& q_v,
                                               const Tensor& q_u, const OptionalTensor& k_v,
                                               const Tensor& k_u, const OptionalTensor& v_v,
                                               const Tensor& v_u, const OptionalTensor& q_bias,
                                               const OptionalTensor& k_bias,
                                               const OptionalTensor& v_bias) {
  if (!has_kernels(x)) {
    return {aten_lowrank(x, q_v, q_u, q_bias), aten_lowrank(x, k_v, k_u, k_bias),
            aten_lowrank(x, v_v, v_u, v_bias)};
  }
  const Weights q(q_v, q_u, q_bias, x);
  const Weights k(k_v, k_u, k_bias, x);
  const Weights v(v_v, v_u, v_bias, x);
  const std::array<LinearWeights, 3> views = {q.views(), k.views(), v.views()};
  return lowrank_qkv_packed(x, pack(views, x), q_u.size(0), k_u.size(0), v_u.size(0),
                            {rank_of(q_v), rank_of(k_v), rank_of(v_v)});
}

}  // namespace deinfer::torch_ops

// The ops of torch.ops.deinfer, on torch's stable ABI: one binary for torch 2.11 and later. Shapes
// and dtypes are documented in python/deinfer/torch_ops.py, which also has what is Python's: shapes
// without data, gradients, autocast.
#include <torch/csrc/stable/library.h>

#include "torch/attention_ops.h"
#include "torch/linear_ops.h"

using namespace deinfer::torch_ops;  // NOLINT: the macros below name functions

namespace {

/// The same functions on every device; they see where their tensors are.
template <typename Library>
void implement(Library& library) {
  library.impl("lowrank_pack", TORCH_BOX(&lowrank_pack));
  library.impl("lowrank_linear", TORCH_BOX(&lowrank_linear));
  library.impl("lowrank_linear_packed", TORCH_BOX(&lowrank_linear_packed));
  library.impl("lowrank_gated_mlp", TORCH_BOX(&lowrank_gated_mlp));
  library.impl("lowrank_gated_mlp_packed", TORCH_BOX(&lowrank_gated_mlp_packed));
  library.impl("lowrank_qkv", TORCH_BOX(&lowrank_qkv));
  library.impl("lowrank_qkv_packed", TORCH_BOX(&lowrank_qkv_packed));
  library.impl("kv_cache_write", TORCH_BOX(&kv_cache_write));
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}

}  // namespace

STABLE_TORCH_LIBRARY(deinfer, library) {
  library.def("lowrank_pack(Tensor?[] v, Tensor[] u, Tensor?[] bias) -> Tensor");
  library.def("lowrank_linear(Tensor x, Tensor v, Tensor u, Tensor? bias=None) -> Tensor");
  library.def(
      "lowrank_linear_packed(Tensor x, Tensor packed, int out_features, int[] ranks=[]) -> Tensor");
  library.def(
      "lowrank_gated_mlp(Tensor x, Tensor? gate_v, Tensor gate_u, Tensor? up_v, Tensor up_u, "
      "Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor");
  library.def(
      "lowrank_gated_mlp_packed(Tensor x, Tensor packed, int out_features, int[] ranks=[]) "
      "-> Tensor");
  library.def(
      "lowrank_qkv(Tensor x, Tensor? q_v, Tensor q_u, Tensor? k_v, Tensor k_u, Tensor? v_v, "
      "Tensor v_u, Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "lowrank_qkv_packed(Tensor x, Tensor packed, int q_features, int k_features, "
      "int v_features, int[] ranks=[]) -> (Tensor, Tensor, Tensor)");
  library.def(
      "kv_cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) "
      "-> ()");
  library.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
      "Tensor query_starts, Tensor lengths, float scale, int window=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(deinfer, CPU, library) { implement(library); }

STABLE_TORCH_LIBRARY_IMPL(deinfer, CUDA, library) { implement(library); }

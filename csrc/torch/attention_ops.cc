// Paged attention and the writing of its cache as custom ops.
#include "torch/attention_ops.h"

#include <limits>

#include "torch/cuda_tensors.h"

namespace deinfer::torch_ops {
namespace {

void check_dims(const Tensor& tensor, std::int64_t dims, const char* name, const char* wanted) {
  if (tensor.dim() != dims) {
    torch_ops::fail(std::string(name) + " has shape " + shape_text(tensor) + ", not " + wanted);
  }
}

/// The pools k[blocks, kv_heads, block_size / 16, head_dim, 16] and v[blocks, kv_heads, block_size,
/// head_dim] as one cache.
PagedCache cache_of(const Tensor& k, const Tensor& v) {
  constexpr std::int64_t kTokens = 16;
  check_dims(k, 5, "k_cache", "[blocks, kv_heads, block_size / 16, head_dim, 16]");
  check_dims(v, 4, "v_cache", "[blocks, kv_heads, block_size, head_dim]");
  check_type(v, k.scalar_type(), "v_cache");
  check_type(k, k.scalar_type(), "k_cache");
  if (!k.is_contiguous() || !v.is_contiguous()) torch_ops::fail("the caches must be contiguous");
  const bool fits = k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                    k.size(2) * kTokens == v.size(2) && k.size(3) == v.size(3) &&
                    k.size(4) == kTokens;
  constexpr std::int64_t kMost = std::int64_t{1} << 24;
  if (!fits || v.size(1) > kMost || v.size(2) > kMost || v.size(3) > kMost) {
    torch_ops::fail("k_cache " + shape_text(k) + " and v_cache " + shape_text(v) +
                    " do not belong together");
  }
  PagedCache cache;
  cache.k = k.mutable_data_ptr();
  cache.v = v.mutable_data_ptr();
  if (!has_kernels(k)) torch_ops::fail("the caches must be float32 or bfloat16");
  cache.dtype = k.scalar_type() == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
  cache.num_blocks = v.size(0);
  cache.kv_heads = static_cast<int>(v.size(1));
  cache.block_size = static_cast<int>(v.size(2));
  cache.head_dim = static_cast<int>(v.size(3));
  return cache;
}

/// A tensor [tokens, heads, head_dim] as [tokens, heads * head_dim].
TensorView tokens_of(const Tensor& tensor, const char* name, std::int64_t head_dim,
                     std::optional<Tensor>& holder) {
  check_dims(tensor, 3, name, "[tokens, heads, head_dim]");
  if (tensor.size(2) != head_dim) {
    torch_ops::fail(std::string(name) + " has shape " + shape_text(tensor) +
                    ", the cache head_dim " + std::to_string(head_dim));
  }
  TensorView view = rows_of(tensor, name, holder);
  view.rows = tensor.size(0);
  view.cols = tensor.size(1) * head_dim;
  view.row_stride = view.cols;
  return view;
}

/// The same of a CUDA device: k[blocks, kv_heads, block_size, width] and v[blocks, kv_heads, width,
/// block_size].
CudaPagedCache cuda_cache_of(const Tensor& k, const Tensor& v, std::int64_t head_dim) {
  check_dims(k, 4, "k_cache", "[blocks, kv_heads, block_size, width]");
  check_dims(v, 4, "v_cache", "[blocks, kv_heads, width, block_size]");
  if (k.scalar_type() != ScalarType::BFloat16) {
    torch_ops::fail(std::string("caches on a CUDA device are bfloat16, not ") +
                    torch::headeronly::toString(k.scalar_type()));
  }
  check_like(v, k, ScalarType::BFloat16, "v_cache");
  if (!k.is_contiguous() || !v.is_contiguous()) torch_ops::fail("the caches must be contiguous");
  const bool fits = k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(3) &&
                    k.size(3) == v.size(2) && k.size(3) == cuda_head_width(head_dim);
  constexpr std::int64_t kMost = std::int64_t{1} << 24;
  if (!fits || k.size(1) > kMost || k.size(2) > kMost) {
    torch_ops::fail("k_cache " + shape_text(k) + " and v_cache " + shape_text(v) +
                    " do not belong to heads of " + std::to_string(head_dim) + " on a CUDA device");
  }
  CudaPagedCache cache;
  cache.k = k.mutable_data_ptr();
  cache.v = v.mutable_data_ptr();
  cache.num_blocks = k.size(0);
  cache.kv_heads = static_cast<int>(k.size(1));
  cache.head_dim = static_cast<int>(head_dim);
  cache.block_size = static_cast<int>(k.size(2));
  return cache;
}

template <typename T>
std::span<const T> list_of(const Tensor& tensor, const Tensor& like, ScalarType type,
                           const char* name) {
  check_like(tensor, like, type, name);
  check_dims(tensor, 1, name, "one dimension");
  if (!tensor.is_contiguous()) torch_ops::fail(std::string(name) + " must be contiguous");
  return {static_cast<const T*>(tensor.const_data_ptr()), static_cast<std::size_t>(tensor.numel())};
}

PagedSequences sequences_of(const Tensor& q, const Tensor& block_table, const Tensor& query_starts,
                            const Tensor& lengths) {
  PagedSequences sequences;
  sequences.query_starts = list_of<std::int32_t>(query_starts, q, ScalarType::Int, "query_starts");
  sequences.lengths = list_of<std::int32_t>(lengths, q, ScalarType::Int, "lengths");
  check_like(block_table, q, ScalarType::Int, "block_table");
  check_dims(block_table, 2, "block_table", "[sequences, blocks]");
  if (block_table.size(0) != lengths.size(0)) {
    torch_ops::fail("block_table has shape " + shape_text(block_table) + " for " +
                    std::to_string(lengths.size(0)) + " sequences");
  }
  if (block_table.size(1) > 1 && block_table.stride(1) != 1) {
    torch_ops::fail("the rows of block_table must be contiguous");
  }
  sequences.block_table = static_cast<const std::int32_t*>(block_table.const_data_ptr());
  sequences.table_cols = block_table.size(1);
  sequences.table_stride = block_table.stride(0);
  return sequences;
}

void cuda_kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& slots) {
  check_dims(k, 3, "k", "[tokens, heads, head_dim]");
  check_like(k_cache, k, k_cache.scalar_type(), "k_cache");
  check_like(v, k, k.scalar_type(), "v");
  const CudaPagedCache cache = cuda_cache_of(k_cache, v_cache, k.size(2));
  std::optional<Tensor> k_holder;
  std::optional<Tensor> v_holder;
  const TensorView keys = tokens_of(k, "k", cache.head_dim, k_holder);
  const TensorView values = tokens_of(v, "v", cache.head_dim, v_holder);
  const auto places = list_of<std::int64_t>(slots, k, ScalarType::Long, "slots");
  if (static_cast<std::int64_t>(places.size()) != keys.rows) {
    torch_ops::fail("there are " + std::to_string(places.size()) + " slots for " +
                    std::to_string(keys.rows) + " tokens");
  }
  const CurrentStream stream(k);
  cuda_write_kv(keys, values, places.data(), cache, stream.get());
}

void cuda_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                 const PagedSequences& from, float scale, int window, const Tensor& out) {
  check_like(k_cache, q, k_cache.scalar_type(), "k_cache");
  check_dims(q, 3, "q", "[tokens, heads, head_dim]");
  const CudaPagedCache cache = cuda_cache_of(k_cache, v_cache, q.size(2));
  std::optional<Tensor> holder;
  const TensorView queries = tokens_of(q, "q", cache.head_dim, holder);
  const auto count = static_cast<std::int64_t>(from.lengths.size());
  if (static_cast<std::int64_t>(from.query_starts.size()) != count + 1) {
    torch_ops::fail("query_starts has " + std::to_string(from.query_starts.size()) +
                    " entries for " + std::to_string(count) + " sequences");
  }
  const CudaPagedSequences sequences = {from.query_starts.data(), from.lengths.data(),
                                        from.block_table, from.table_stride, count};
  const std::size_t bytes =
      cuda_attention_workspace_bytes(queries.rows, static_cast<int>(q.size(1)), cache, count);
  Tensor workspace = empty_bytes(q, bytes);
  MutableTensorView rows = rows_of_output(out);
  rows.rows = queries.rows;
  rows.cols = rows.row_stride = queries.cols;
  const CurrentStream stream(q);
  cuda_paged_attention(queries, cache, sequences, scale, window, rows, workspace.mutable_data_ptr(),
                       bytes, stream.get());
}

}  // namespace

void kv_cache_write(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slots) {
  if (k.is_cuda()) return cuda_kv_cache_write(k, v, k_cache, v_cache, slots);
  const PagedCache cache = cache_of(k_cache, v_cache);
  std::optional<Tensor> k_holder;
  std::optional<Tensor> v_holder;
  const TensorView keys = tokens_of(k, "k", cache.head_dim, k_holder);
  const TensorView values = tokens_of(v, "v", cache.head_dim, v_holder);
  executor().write_kv(keys, values, list_of<std::int64_t>(slots, k, ScalarType::Long, "slots"),
                      cache, num_threads());
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& block_table, const Tensor& query_starts, const Tensor& lengths,
                       double scale, std::int64_t window) {
  const PagedSequences sequences = sequences_of(q, block_table, query_starts, lengths);
  if (window < 0 || window > std::numeric_limits<int>::max()) {
    torch_ops::fail("window is " + std::to_string(window));
  }
  Tensor out = torch::stable::new_empty(q, q.sizes());
  const auto factor = static_cast<float>(scale);
  const auto seen = static_cast<int>(window);
  if (q.is_cuda()) {
    cuda_attend(q, k_cache, v_cache, sequences, factor, seen, out);
    return out;
  }
  const PagedCache cache = cache_of(k_cache, v_cache);
  std::optional<Tensor> holder;
  const TensorView queries = tokens_of(q, "q", cache.head_dim, holder);
  MutableTensorView rows = rows_of_output(out);
  rows.rows = queries.rows;
  rows.cols = rows.row_stride = queries.cols;
  executor().paged_attention(queries, cache, sequences, factor, seen, rows, num_threads());
  return out;
}

}  // namespace deinfer::torch_ops

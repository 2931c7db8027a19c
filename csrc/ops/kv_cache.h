// The paged KV memory of one rank: of every layer a pool of K and one of V, each as wide as what it
// keeps. Block tables are common to all layers and ranks; of a token-sharded layer a rank has a run
// of the tokens of every block.
#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "deinfer/tensor.h"
#include "kernels/cpu/kernel_table.h"
#include "plan/kv_forms.h"

namespace deinfer {

/// The pool of one side. Dense K and latents that K absorbs have the layout of K in
/// kernels/cpu/kernel_table.h, all else that of V.
struct KvSide {
  std::byte* data = nullptr;
  KvSideShape shape;
  DType dtype = DType::kFloat32;
  int block_size = 0;  // tokens of a block that the rank keeps
  int rank = 0;        // of those that divide a block's tokens
  int ranks = 1;

  cpu::TokenShare share() const { return {rank, ranks, block_size}; }
  bool is_latent() const { return shape.form != KvForm::kDense; }
  std::ptrdiff_t head_stride() const { return std::ptrdiff_t{block_size} * shape.dim; }
  std::ptrdiff_t block_stride() const { return head_stride() * shape.heads; }
  /// Head `head` of block `block`.
  std::byte* at(std::int32_t block, int head) const {
    return data + (block * block_stride() + head * head_stride()) *
                      static_cast<std::ptrdiff_t>(dtype_size(dtype));
  }
  /// From head `head` on, each of which `group` heads of the query share.
  cpu::KvSideView view(int head, int group, const std::int32_t* block_table) const;
};

struct KvLayer {
  KvSide k;
  KvSide v;
};

/// Shape of a rank's cache.
struct KvCacheConfig {
  std::vector<KvLayerShape> layers;
  int block_size = 16;  // a multiple of 16 x the ranks that divide the tokens of a layer
  std::int64_t num_blocks = 0;
  DType dtype = DType::kFloat32;
  int rank = 0;  // of those that divide tokens

  /// Bytes that a token takes in one side of a layer where it is kept.
  std::uint64_t token_bytes(const KvSideShape& side) const {
    return side.elements() * dtype_size(dtype);
  }
  /// Tokens of a block that the rank keeps.
  int kept_tokens(const KvLayerShape& layer) const { return block_size / layer.ranks; }
  /// Bytes of one block over all layers, K and V.
  std::uint64_t block_bytes() const;
};

/// Owns the pools of all layers. Pages are taken from the OS when blocks are first used.
class KvCache {
 public:
  explicit KvCache(const KvCacheConfig& config);
  const KvCacheConfig& config() const { return config_; }
  KvLayer layer(int index);
  /// Bytes of the pools of K and of V of a layer.
  std::uint64_t k_bytes(int layer) const { return k_[static_cast<std::size_t>(layer)].size(); }
  std::uint64_t v_bytes(int layer) const { return v_[static_cast<std::size_t>(layer)].size(); }

 private:
  KvCacheConfig config_;
  std::vector<Buffer> k_;
  std::vector<Buffer> v_;
};

}  // namespace deinfer

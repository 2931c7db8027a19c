// The paged KV memory of one rank.
#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "deinfer/tensor.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer {

/// K and V pools of one layer in the layout of kernels/cpu/kernel_table.h.
struct KvLayer {
  std::byte* k = nullptr;
  std::byte* v = nullptr;
  DType dtype = DType::kFloat32;
  int kv_heads = 0;
  int head_dim = 0;
  int block_size = 0;

  std::ptrdiff_t head_stride() const { return std::ptrdiff_t{block_size} * head_dim; }
  std::ptrdiff_t block_stride() const { return head_stride() * kv_heads; }
  /// Elements before kv head `head` of block `block`.
  std::ptrdiff_t offset(std::int32_t block, int head) const {
    return block * block_stride() + head * head_stride();
  }
  cpu::KvView view(int head, const std::int32_t* block_table) const;
};

/// Shape of a rank's cache.
struct KvCacheConfig {
  int num_layers = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int block_size = 16;
  std::int64_t num_blocks = 0;
  DType dtype = DType::kFloat32;

  /// Bytes of one block over all layers, K and V.
  std::uint64_t block_bytes() const;
};

/// Owns the pools of all layers. Pages are taken from the OS when blocks are first used.
class KvCache {
 public:
  explicit KvCache(const KvCacheConfig& config);
  const KvCacheConfig& config() const { return config_; }
  KvLayer layer(int index);

 private:
  KvCacheConfig config_;
  std::vector<Buffer> k_;
  std::vector<Buffer> v_;
};

}  // namespace deinfer

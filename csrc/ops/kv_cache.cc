#include "ops/kv_cache.h"

namespace deinfer {

cpu::KvSideView KvSide::view(int head, int group, const std::int32_t* block_table) const {
  cpu::KvSideView side;
  side.data = at(0, head);
  side.block_stride = block_stride();
  side.head_stride = head_stride();
  side.block_table = block_table;
  side.block_size = block_size;
  side.dim = shape.dim;
  side.group = group;
  return side;
}

std::uint64_t KvCacheConfig::token_bytes() const {
  std::uint64_t bytes = 0;
  for (const KvLayerShape& layer : layers) bytes += token_bytes(layer.k) + token_bytes(layer.v);
  return bytes;
}

KvCache::KvCache(const KvCacheConfig& config) : config_(config) {
  const std::uint64_t tokens =
      static_cast<std::uint64_t>(config.block_size) * static_cast<std::uint64_t>(config.num_blocks);
  for (const KvLayerShape& layer : config.layers) {
    k_.emplace_back(config.token_bytes(layer.k) * tokens);
    v_.emplace_back(config.token_bytes(layer.v) * tokens);
  }
}

KvLayer KvCache::layer(int index) {
  auto i = static_cast<std::size_t>(index);
  auto side = [&](Buffer& pool, const KvSideShape& shape) {
    return KvSide{pool.as<std::byte>(), shape, config_.dtype, config_.block_size};
  };
  return {side(k_[i], config_.layers[i].k), side(v_[i], config_.layers[i].v)};
}

}  // namespace deinfer

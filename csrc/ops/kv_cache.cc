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

std::uint64_t KvCacheConfig::block_bytes() const {
  std::uint64_t bytes = 0;
  for (const KvLayerShape& layer : layers) {
    bytes += (token_bytes(layer.k) + token_bytes(layer.v)) *
             static_cast<std::uint64_t>(kept_tokens(layer));
  }
  return bytes;
}

KvCache::KvCache(const KvCacheConfig& config) : config_(config) {
  for (const KvLayerShape& layer : config.layers) {
    const std::uint64_t tokens = static_cast<std::uint64_t>(config.kept_tokens(layer)) *
                                 static_cast<std::uint64_t>(config.num_blocks);
    k_.emplace_back(config.token_bytes(layer.k) * tokens);
    v_.emplace_back(config.token_bytes(layer.v) * tokens);
  }
}

KvLayer KvCache::layer(int index) {
  auto i = static_cast<std::size_t>(index);
  const KvLayerShape& layer = config_.layers[i];
  auto side = [&](Buffer& pool, const KvSideShape& shape) {
    return KvSide{pool.as<std::byte>(),       shape,        config_.dtype,
                  config_.kept_tokens(layer), config_.rank, layer.ranks};
  };
  return {side(k_[i], layer.k), side(v_[i], layer.v)};
}

}  // namespace deinfer

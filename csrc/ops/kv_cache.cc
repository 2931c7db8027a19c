#include "ops/kv_cache.h"

namespace deinfer {

cpu::KvView KvLayer::view(int head, const std::int32_t* block_table) const {
  std::ptrdiff_t bytes = head * head_stride() * static_cast<std::ptrdiff_t>(dtype_size(dtype));
  cpu::KvView view;
  view.k = k + bytes;
  view.v = v + bytes;
  view.block_stride = block_stride();
  view.block_table = block_table;
  view.block_size = block_size;
  view.head_dim = head_dim;
  return view;
}

std::uint64_t KvCacheConfig::block_bytes() const {
  return std::uint64_t{2} * static_cast<std::uint64_t>(num_layers) *
         static_cast<std::uint64_t>(kv_heads) * static_cast<std::uint64_t>(head_dim) *
         static_cast<std::uint64_t>(block_size) * dtype_size(dtype);
}

KvCache::KvCache(const KvCacheConfig& config) : config_(config) {
  std::uint64_t side = config.block_bytes() / 2 / static_cast<std::uint64_t>(config.num_layers) *
                       static_cast<std::uint64_t>(config.num_blocks);
  for (int i = 0; i < config.num_layers; ++i) {
    k_.emplace_back(side);
    v_.emplace_back(side);
  }
}

KvLayer KvCache::layer(int index) {
  auto i = static_cast<std::size_t>(index);
  return {k_[i].as<std::byte>(), v_[i].as<std::byte>(), config_.dtype,
          config_.kv_heads,      config_.head_dim,      config_.block_size};
}

}  // namespace deinfer

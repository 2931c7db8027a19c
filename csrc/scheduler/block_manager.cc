#include "scheduler/block_manager.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace deinfer {
namespace {

std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 32);
}

void require(bool ok, const char* what, std::int32_t block) {
  if (!ok) fail(ErrorCode::kInternal, "block manager: ", what, " (block ", block, ")");
}

}  // namespace

std::uint64_t block_hash(std::uint64_t parent, std::span<const TokenId> tokens) {
  std::uint64_t hash = mix(0, parent);
  for (const TokenId token : tokens) hash = mix(hash, static_cast<std::uint32_t>(token));
  return hash;
}

BlockManager::BlockManager(int num_blocks, int block_size, bool enable_prefix_caching)
    : num_blocks_(num_blocks),
      block_size_(block_size),
      enable_prefix_caching_(enable_prefix_caching) {
  check_argument(num_blocks >= 1, "num_blocks must be at least 1, got ", num_blocks);
  check_argument(block_size >= 1, "block_size must be at least 1, got ", block_size);
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  free_.reserve(blocks_.size());
  for (std::int32_t block = num_blocks; block-- > 0;) free_.push_back(block);
  if (enable_prefix_caching) {
    buckets_.assign(std::bit_ceil(blocks_.size()), kNone);
    contents_.resize(blocks_.size() * static_cast<std::size_t>(block_size));
  }
}

void BlockManager::match_prefix(const Sequence& sequence, PrefixMatch& match) const {
  match.blocks.clear();
  match.node = 0;
  match.num_cached = 0;
  if (!enable_prefix_caching_ || !sequence.reuse_prefix) return;
  const auto limit = static_cast<std::size_t>((sequence.length() - 1) / block_size_);
  for (std::size_t i = 0; i < limit; ++i) {
    const std::span<const TokenId> tokens = block_tokens(sequence, i);
    const std::int32_t block = find(match.node, tokens, block_hash(match.node, tokens));
    if (block == kNone) return;
    match.blocks.push_back(block);
    match.node = at(block).node;
    if (at(block).references == 0) ++match.num_cached;
  }
}

void BlockManager::take_prefix(Sequence& sequence, const PrefixMatch& match) {
  for (const std::int32_t block : match.blocks) add_reference(block);
  sequence.block_table = match.blocks;
  sequence.num_registered = static_cast<int>(match.blocks.size());
  sequence.num_computed = sequence.num_registered * block_size_;
  sequence.prefix_node = match.node;
}

bool BlockManager::grow(Sequence& sequence, int num_tokens) {
  const auto wanted = static_cast<std::size_t>(blocks_for(num_tokens));
  std::vector<std::int32_t>& table = sequence.block_table;
  if (wanted > table.size() + static_cast<std::size_t>(num_available())) return false;
  while (table.size() < wanted) {
    const std::int32_t block = allocate();
    at(block).references = 1;
    table.push_back(block);
  }
  return true;
}

void BlockManager::register_computed(Sequence& sequence, int num_tokens) {
  if (!enable_prefix_caching_) return;
  for (const int full = num_tokens / block_size_; sequence.num_registered < full;
       ++sequence.num_registered) {
    const auto index = static_cast<std::size_t>(sequence.num_registered);
    const std::span<const TokenId> tokens = block_tokens(sequence, index);
    const std::uint64_t hash = block_hash(sequence.prefix_node, tokens);
    std::int32_t block = find(sequence.prefix_node, tokens, hash);
    if (block == kNone) {
      block = sequence.block_table[index];
      insert(block, sequence.prefix_node, tokens, hash);
    } else {  // another sequence computed the same: its block stays the shared one
      sequence.computed_twice = true;
    }
    sequence.prefix_node = at(block).node;
  }
}

void BlockManager::release(Sequence& sequence) {
  // Last block first: the end of a prefix is evicted before its beginning, without which it could
  // not be found, and the lowest blocks end up on top of the free list.
  for (std::size_t i = sequence.block_table.size(); i-- > 0;) {
    drop_reference(sequence.block_table[i]);
  }
  sequence.block_table.clear();
  sequence.num_computed = 0;
  sequence.num_registered = 0;
  sequence.computed_twice = false;
  sequence.prefix_node = 0;
}

int BlockManager::reference_count(std::int32_t block) const {
  check_argument(block >= 0 && block < num_blocks_, "no block ", block);
  return at(block).references;
}

std::span<const TokenId> BlockManager::block_tokens(const Sequence& sequence,
                                                    std::size_t index) const {
  const auto size = static_cast<std::size_t>(block_size_);
  return std::span(sequence.tokens).subspan(index * size, size);
}

std::span<const TokenId> BlockManager::contents(std::int32_t block) const {
  const auto size = static_cast<std::size_t>(block_size_);
  return std::span(contents_).subspan(static_cast<std::size_t>(block) * size, size);
}

std::int32_t BlockManager::find(std::uint64_t parent, std::span<const TokenId> tokens,
                                std::uint64_t hash) const {
  std::int32_t block = buckets_[hash & (buckets_.size() - 1)];
  for (; block != kNone; block = at(block).next_in_bucket) {
    const Block& b = at(block);
    if (b.hash == hash && b.parent == parent && std::ranges::equal(contents(block), tokens)) break;
  }
  return block;
}

void BlockManager::insert(std::int32_t block, std::uint64_t parent, std::span<const TokenId> tokens,
                          std::uint64_t hash) {
  std::int32_t& bucket = buckets_[hash & (buckets_.size() - 1)];
  Block& b = at(block);
  b.node = ++last_node_;
  b.parent = parent;
  b.hash = hash;
  b.next_in_bucket = bucket;
  bucket = block;
  std::ranges::copy(tokens, contents_.begin() + std::ptrdiff_t{block} * block_size_);
}

void BlockManager::forget(std::int32_t block) {
  Block& b = at(block);
  std::int32_t* link = &buckets_[b.hash & (buckets_.size() - 1)];
  while (*link != block) link = &at(*link).next_in_bucket;
  *link = b.next_in_bucket;
  b.next_in_bucket = kNone;
  b.node = 0;
}

void BlockManager::add_reference(std::int32_t block) {
  if (at(block).references++ == 0) unlink(block);
}

void BlockManager::drop_reference(std::int32_t block) {
  Block& b = at(block);
  if (--b.references > 0) return;
  if (b.node != 0) {
    push_newest(block);
  } else {
    free_.push_back(block);
  }
}

void BlockManager::push_newest(std::int32_t block) {
  at(block).older = newest_;
  at(block).newer = kNone;
  (newest_ == kNone ? oldest_ : at(newest_).newer) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockManager::unlink(std::int32_t block) {
  Block& b = at(block);
  (b.older == kNone ? oldest_ : at(b.older).newer) = b.newer;
  (b.newer == kNone ? newest_ : at(b.newer).older) = b.older;
  b.older = b.newer = kNone;
  --num_cached_;
}

std::int32_t BlockManager::allocate() {
  std::int32_t block = oldest_;
  if (!free_.empty()) {
    block = free_.back();
    free_.pop_back();
  } else {
    unlink(block);
    forget(block);
  }
  return block;
}

void BlockManager::check_invariants(std::span<const Sequence* const> holders) const {
  std::vector<std::int32_t> references(blocks_.size(), 0);
  for (const Sequence* sequence : holders) {
    const std::vector<std::int32_t>& table = sequence->block_table;
    for (std::size_t i = 0; i < table.size(); ++i) {
      require(table[i] >= 0 && table[i] < num_blocks_, "block table out of range", table[i]);
      ++references[static_cast<std::size_t>(table[i])];
      if (at(table[i]).node == 0) continue;
      require(std::ranges::equal(contents(table[i]), block_tokens(*sequence, i)),
              "registered content differs from its holder's tokens", table[i]);
    }
  }
  std::vector<int> seen(blocks_.size(), 0);  // 1: free, 2: cached
  for (const std::int32_t block : free_) {
    require(seen[static_cast<std::size_t>(block)]++ == 0, "twice in the free list", block);
    require(at(block).node == 0, "free but registered", block);
  }
  int cached = 0;
  for (std::int32_t block = oldest_, older = kNone; block != kNone; block = at(block).newer) {
    require(at(block).older == older, "broken list of cached blocks", block);
    require(at(block).node != 0, "cached but not registered", block);
    require(seen[static_cast<std::size_t>(block)] == 0, "cached twice or free", block);
    seen[static_cast<std::size_t>(block)] = 2;
    older = block;
    ++cached;
  }
  require(cached == num_cached_, "count of cached blocks is wrong", cached);
  for (std::int32_t block = 0; block < num_blocks_; ++block) {
    const auto index = static_cast<std::size_t>(block);
    require(at(block).references == references[index], "reference count is wrong", block);
    require((references[index] == 0) == (seen[index] != 0), "neither held nor available", block);
    if (at(block).node == 0) continue;
    require(find(at(block).parent, contents(block), at(block).hash) == block,
            "registered but not found", block);
  }
}

}  // namespace deinfer

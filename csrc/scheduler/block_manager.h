// Paged KV blocks: reference counts, a free list and automatic prefix caching.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "scheduler/sequence.h"

namespace deinfer {

/// Hash of a block's tokens and its parent node. Fast, and not hard to make collide on purpose.
std::uint64_t block_hash(std::uint64_t parent, std::span<const TokenId> tokens);

/// Hands out the blocks of the KV pool by number; it never sees their memory.
///
/// A block is used (one or more sequences hold it), cached (nobody holds it, but its content is
/// known and may be taken again until it is evicted, least recently used first) or free. Free
/// blocks are handed out last-freed first and in ascending order at the start, so that a pool that
/// is lightly used touches little memory.
///
/// Prefix cache: a full block is registered under its content, which is the tokens in it and the
/// whole chain of blocks before it. A chain is named by a node number that is never used twice, so
/// comparing (parent node, tokens) compares the entire prefix exactly; hashes only find candidates.
class BlockManager {
 public:
  /// Throws Error(kInvalidArgument) unless num_blocks >= 1 and block_size >= 1.
  BlockManager(int num_blocks, int block_size, bool enable_prefix_caching);

  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_cached() const { return num_cached_; }
  int num_used() const { return num_blocks_ - num_free() - num_cached_; }
  /// Blocks that can be handed out now: free and cached ones.
  int num_available() const { return num_free() + num_cached_; }
  /// Blocks that hold so many tokens.
  std::int64_t blocks_for(std::int64_t tokens) const {
    return (tokens + block_size_ - 1) / block_size_;
  }

  /// The longest registered prefix of a sequence that holds no blocks yet; always leaves at least
  /// its last token to compute, and is empty unless the sequence has reuse_prefix.
  struct PrefixMatch {
    std::vector<std::int32_t> blocks;
    std::uint64_t node = 0;  // names the content of the blocks
    int num_cached = 0;      // blocks that nobody holds: taking them makes them unavailable
  };
  /// `match` is an in/out buffer so that repeated calls reuse its memory.
  void match_prefix(const Sequence& sequence, PrefixMatch& match) const;
  /// Gives the matched blocks to the sequence and sets its num_computed. Nothing may have been
  /// allocated since match_prefix().
  void take_prefix(Sequence& sequence, const PrefixMatch& match);

  /// Extends the block table to hold num_tokens tokens. False, changing nothing, when there are not
  /// enough blocks.
  bool grow(Sequence& sequence, int num_tokens);
  /// Tokens that the sequence could hold with its own and all available blocks.
  std::int64_t capacity(const Sequence& sequence) const {
    return (static_cast<std::int64_t>(sequence.block_table.size()) + num_available()) * block_size_;
  }

  /// Lets others share the full blocks among the first num_tokens tokens, which are computed or
  /// will be by the step that is being planned.
  void register_computed(Sequence& sequence, int num_tokens);
  /// Takes all blocks from the sequence, which has no computed tokens then. Registered ones stay
  /// cached.
  void release(Sequence& sequence);

  /// How many sequences hold a block.
  int reference_count(std::int32_t block) const;
  /// Throws Error(kInternal) unless the counts, lists and the table of contents agree with each
  /// other and with `holders`, all sequences that hold blocks. For tests: O(num_blocks + table
  /// sizes).
  void check_invariants(std::span<const Sequence* const> holders) const;

 private:
  static constexpr std::int32_t kNone = -1;

  struct Block {
    std::int32_t references = 0;
    std::int32_t newer = kNone;  // neighbours in the list of cached blocks
    std::int32_t older = kNone;
    std::int32_t next_in_bucket = kNone;
    std::uint64_t node = 0;    // 0: not registered
    std::uint64_t parent = 0;  // node of the block before it, 0 for the first
    std::uint64_t hash = 0;    // of (parent, tokens)
  };

  std::span<const TokenId> block_tokens(const Sequence& sequence, std::size_t index) const;
  std::span<const TokenId> contents(std::int32_t block) const;
  std::int32_t find(std::uint64_t parent, std::span<const TokenId> tokens,
                    std::uint64_t hash) const;
  void insert(std::int32_t block, std::uint64_t parent, std::span<const TokenId> tokens,
              std::uint64_t hash);
  void forget(std::int32_t block);
  void add_reference(std::int32_t block);
  void drop_reference(std::int32_t block);
  void push_newest(std::int32_t block);
  void unlink(std::int32_t block);
  std::int32_t allocate();
  Block& at(std::int32_t block) { return blocks_[static_cast<std::size_t>(block)]; }
  const Block& at(std::int32_t block) const { return blocks_[static_cast<std::size_t>(block)]; }

  const int num_blocks_;
  const int block_size_;
  const bool enable_prefix_caching_;
  std::vector<Block> blocks_;
  std::vector<std::int32_t> free_;     // a stack
  std::vector<std::int32_t> buckets_;  // hash -> first block, a power of two of them
  std::vector<TokenId> contents_;      // [num_blocks, block_size], of registered blocks
  std::int32_t newest_ = kNone;
  std::int32_t oldest_ = kNone;
  int num_cached_ = 0;
  std::uint64_t last_node_ = 0;
};

}  // namespace deinfer

#include "scheduler/block_manager.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <span>
#include <unordered_map>
#include <vector>

#include "deinfer/error.h"

namespace deinfer {
namespace {

using Blocks = std::vector<std::int32_t>;

/// A sequence with the tokens first, first + 1, ...
Sequence counting_sequence(int length, TokenId first = 0) {
  Sequence sequence;
  sequence.tokens.resize(static_cast<std::size_t>(length));
  std::iota(sequence.tokens.begin(), sequence.tokens.end(), first);
  sequence.prompt_length = length;
  return sequence;
}

/// Takes what the cache has, allocates the rest, and registers all of it; the tokens matched.
int compute_all(BlockManager& blocks, Sequence& sequence) {
  BlockManager::PrefixMatch match;
  blocks.match_prefix(sequence, match);
  blocks.take_prefix(sequence, match);
  const int matched = sequence.num_computed;
  EXPECT_TRUE(blocks.grow(sequence, sequence.length()));
  blocks.register_computed(sequence, sequence.length());
  sequence.num_computed = sequence.length();
  return matched;
}

TEST(BlockManager, HandsOutLowBlocksFirstAndReusesTheLastFreed) {
  BlockManager blocks(8, 4, false);
  Sequence a = counting_sequence(9);
  Sequence b = counting_sequence(4);
  ASSERT_TRUE(blocks.grow(a, 9));
  ASSERT_TRUE(blocks.grow(b, 4));
  EXPECT_EQ(a.block_table, (Blocks{0, 1, 2}));
  EXPECT_EQ(b.block_table, (Blocks{3}));
  blocks.release(a);
  EXPECT_TRUE(a.block_table.empty());
  ASSERT_TRUE(blocks.grow(a, 8));
  EXPECT_EQ(a.block_table, (Blocks{0, 1}));
  EXPECT_EQ(blocks.num_free(), 5);
}

TEST(BlockManager, GrowthIsAllOrNothing) {
  BlockManager blocks(3, 4, false);
  Sequence a = counting_sequence(16);
  EXPECT_FALSE(blocks.grow(a, 13));
  EXPECT_TRUE(a.block_table.empty());
  EXPECT_TRUE(blocks.grow(a, 12));
  EXPECT_TRUE(blocks.grow(a, 3)) << "never shrinks";
  EXPECT_EQ(a.block_table.size(), 3u);
  EXPECT_EQ(blocks.num_available(), 0);
}

TEST(BlockManager, SharesFullBlocksButLeavesTheLastTokenToCompute) {
  BlockManager blocks(16, 4, true);
  Sequence a = counting_sequence(10);
  EXPECT_EQ(compute_all(blocks, a), 0);
  Sequence same = counting_sequence(10);
  EXPECT_EQ(compute_all(blocks, same), 8);
  EXPECT_EQ(blocks.reference_count(a.block_table[0]), 2);
  EXPECT_NE(same.block_table[2], a.block_table[2]);
  Sequence full = counting_sequence(8);
  EXPECT_EQ(compute_all(blocks, full), 4) << "block 1 would leave nothing to compute";
  Sequence longer = counting_sequence(9);
  EXPECT_EQ(compute_all(blocks, longer), 8);
  Sequence refuses = counting_sequence(10);
  refuses.reuse_prefix = false;
  EXPECT_EQ(compute_all(blocks, refuses), 0);
  blocks.check_invariants(std::vector<const Sequence*>{&a, &same, &full, &longer, &refuses});
}

TEST(BlockManager, DisabledCacheSharesNothing) {
  BlockManager blocks(16, 4, false);
  Sequence a = counting_sequence(10);
  Sequence b = counting_sequence(10);
  compute_all(blocks, a);
  EXPECT_EQ(compute_all(blocks, b), 0);
  blocks.release(a);
  EXPECT_EQ(blocks.num_cached(), 0);
  EXPECT_EQ(blocks.num_free(), 13);
}

TEST(BlockManager, SameTokensAfterAnotherPrefixAreNotShared) {
  BlockManager blocks(16, 2, true);
  Sequence a;
  a.tokens = {1, 2, 7, 7, 0};
  Sequence b;
  b.tokens = {3, 4, 7, 7, 0};
  compute_all(blocks, a);
  EXPECT_EQ(compute_all(blocks, b), 0);
  Sequence c;
  c.tokens = {7, 7, 0};
  EXPECT_EQ(compute_all(blocks, c), 0);
}

TEST(BlockManager, FreedBlocksStayCachedUntilEvictedOldestAndDeepestFirst) {
  BlockManager blocks(6, 4, true);
  Sequence old_one = counting_sequence(12, 0);
  Sequence new_one = counting_sequence(8, 100);
  compute_all(blocks, old_one);
  compute_all(blocks, new_one);
  blocks.release(old_one);
  blocks.release(new_one);
  EXPECT_EQ(blocks.num_cached(), 5);
  EXPECT_EQ(blocks.num_free(), 1);

  Sequence other = counting_sequence(12, 200);  // the free block and two of old_one's
  BlockManager::PrefixMatch match;
  ASSERT_TRUE(blocks.grow(other, 12));
  blocks.match_prefix(counting_sequence(13, 0), match);
  EXPECT_EQ(match.blocks.size(), 1u) << "the beginning outlives the end";
  EXPECT_EQ(match.num_cached, 1);
  blocks.match_prefix(counting_sequence(9, 100), match);
  EXPECT_EQ(match.blocks.size(), 2u);
  blocks.check_invariants(std::vector<const Sequence*>{&other});
}

TEST(BlockManager, AMatchIsNeverBuiltOnAnEvictedParent) {
  // b computes the same first block as a, unshared, and registers its second block under a's first.
  BlockManager blocks(5, 2, true);
  Sequence a;
  a.tokens = {1, 1, 5};
  Sequence b;
  b.tokens = {1, 1, 2, 2, 9};
  ASSERT_TRUE(blocks.grow(a, 3));
  ASSERT_TRUE(blocks.grow(b, 5));
  blocks.register_computed(a, 2);
  blocks.register_computed(b, 4);
  const std::int32_t parent = a.block_table[0];
  blocks.release(a);
  Sequence hog;  // takes the only free block, so that the next one has to evict
  ASSERT_TRUE(blocks.grow(hog, 1));
  Sequence other;  // the same second block after another first one, in the place of a's
  other.tokens = {8, 8, 2, 2, 2};
  ASSERT_TRUE(blocks.grow(other, 2));
  ASSERT_EQ(other.block_table[0], parent);
  blocks.register_computed(other, 2);
  BlockManager::PrefixMatch match;
  blocks.match_prefix(other, match);
  EXPECT_EQ(match.blocks.size(), 1u);
  blocks.match_prefix(b, match);
  EXPECT_TRUE(match.blocks.empty());
  blocks.check_invariants(std::vector<const Sequence*>{&b, &hog, &other});
}

TEST(BlockManager, ComparesTokensAndNotOnlyHashes) {
  // Two beginnings whose hashes agree in the upper half (a birthday away); the last tokens of the
  // block cancel the lower half.
  Sequence a;
  Sequence b;
  std::unordered_map<std::uint64_t, TokenId> by_upper_half;
  for (TokenId i = 0; b.tokens.empty(); ++i) {
    ASSERT_LT(i, 1'000'000);
    const std::uint64_t hash = block_hash(0, std::vector<TokenId>{i, i});
    const auto [other, is_new] = by_upper_half.emplace(hash >> 32, i);
    if (is_new) continue;
    const TokenId j = other->second;
    const std::uint64_t difference = hash ^ block_hash(0, std::vector<TokenId>{j, j});
    a.tokens = {j, j, 0, 5};
    b.tokens = {i, i, static_cast<TokenId>(difference), 5};
  }
  ASSERT_EQ(block_hash(0, std::span(a.tokens).first(3)),
            block_hash(0, std::span(b.tokens).first(3)))
      << "the hash has changed: find another way to a collision";
  BlockManager blocks(8, 3, true);
  EXPECT_EQ(compute_all(blocks, a), 0);
  EXPECT_EQ(compute_all(blocks, b), 0);
  Sequence again;
  again.tokens = b.tokens;
  EXPECT_EQ(compute_all(blocks, again), 3);
  EXPECT_EQ(again.block_table[0], b.block_table[0]);
  blocks.check_invariants(std::vector<const Sequence*>{&a, &b, &again});
}

TEST(BlockManager, RejectsABadPool) {
  EXPECT_THROW(BlockManager(0, 16, true), Error);
  EXPECT_THROW(BlockManager(4, 0, true), Error);
  EXPECT_THROW(BlockManager(4, 4, true).reference_count(4), Error);
}

TEST(BlockManager, InvariantCheckNoticesALeak) {
  BlockManager blocks(4, 4, true);
  Sequence a = counting_sequence(4);
  ASSERT_TRUE(blocks.grow(a, 4));
  EXPECT_THROW(blocks.check_invariants({}), Error);
}

TEST(BlockManager, RandomOperationsKeepTheInvariants) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&random](int n) {
      return static_cast<int>(random() % static_cast<unsigned>(n));
    };
    const int block_size = 1 + below(4);
    BlockManager blocks(1 + below(30), block_size, seed % 4 != 0);
    std::vector<Sequence> sequences(6);
    for (int step = 0; step < 400; ++step) {
      Sequence& s = sequences[static_cast<std::size_t>(below(6))];
      if (s.block_table.empty()) {
        s.tokens.assign(static_cast<std::size_t>(1 + below(24)), 0);
        for (TokenId& token : s.tokens) token = below(2);  // few values: many shared prefixes
        BlockManager::PrefixMatch match;
        blocks.match_prefix(s, match);
        ASSERT_LE(match.num_cached, blocks.num_cached());
        ASSERT_LT(match.blocks.size() * static_cast<std::size_t>(block_size), s.tokens.size());
        blocks.take_prefix(s, match);
      } else if (below(3) == 0) {
        blocks.release(s);
      } else {
        const int target = std::min(s.length(), s.num_computed + 1 + below(8));
        if (blocks.grow(s, target)) {
          s.num_computed = target;
          blocks.register_computed(s, target);
        } else {
          blocks.release(s);
        }
      }
      std::vector<const Sequence*> holders;
      for (const Sequence& holder : sequences) holders.push_back(&holder);
      blocks.check_invariants(holders);
      ASSERT_EQ(blocks.num_used() + blocks.num_cached() + blocks.num_free(), blocks.num_blocks());
    }
  }
}

}  // namespace
}  // namespace deinfer

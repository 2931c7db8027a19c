// How plans divide dimensions among ranks, and overlap the rank dimension and the tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "plan/overlap.h"
#include "plan/tensor_parallel_plan.h"
#include "plan_shapes.h"

namespace deinfer {
namespace {

using test::describe;
using test::kSizes;
using test::Random;
using test::random_shape;

TEST(Plan, SharesPartitionTheirDimensions) {
  Random random(3);
  for (int trial = 0; trial < 200; ++trial) {
    const ModelShape model = random_shape(random);
    const int size = random.between(1, std::min(8, model.num_heads));
    auto plan = make_plan("hidden_sharded", model, size);
    SCOPED_TRACE(describe(*plan));
    const int group = model.num_heads / model.num_kv_heads;
    int hidden = 0, intermediate = 0, vocab = 0, head = 0, kv = 0, fewest = 1 << 30, most = 0;
    for (int i = 0; i < size; ++i) {
      const Range h = plan->hidden_share(i), f = plan->intermediate_share(i);
      const Range words = plan->vocab_share(i);
      EXPECT_EQ(h.begin, hidden);
      EXPECT_EQ(f.begin, intermediate);
      EXPECT_EQ(words.begin, vocab);
      EXPECT_TRUE(h.end % 16 == 0 || h.end == model.hidden_size);
      EXPECT_TRUE(f.end % 16 == 0 || f.end == model.intermediate_size);
      EXPECT_TRUE(words.end % 32 == 0 || words.end == model.vocab_size);
      hidden = h.end, intermediate = f.end, vocab = words.end;

      const HeadShare share = plan->head_share(i);
      EXPECT_EQ(share.heads.begin, head);
      head = share.heads.end;
      EXPECT_GE(share.heads.size(), 1);
      EXPECT_EQ(share.kv_heads.begin, share.heads.begin / group);
      EXPECT_EQ(share.kv_heads.end, (share.heads.end - 1) / group + 1);
      EXPECT_EQ(share.heads.size() % share.kv_heads.size(), 0);
      if (size <= model.num_kv_heads) {
        EXPECT_EQ(share.kv_heads.begin, kv);
        EXPECT_EQ(share.heads.size(), share.kv_heads.size() * group);
        fewest = std::min(fewest, share.kv_heads.size());
        most = std::max(most, share.kv_heads.size());
      } else {
        EXPECT_EQ(share.kv_heads.size(), 1);
      }
      kv = share.kv_heads.end;
    }
    EXPECT_EQ(hidden, model.hidden_size);
    EXPECT_EQ(intermediate, model.intermediate_size);
    EXPECT_EQ(vocab, model.vocab_size);
    EXPECT_EQ(head, model.num_heads);
    EXPECT_EQ(kv, model.num_kv_heads);
    EXPECT_LE(most - std::min(fewest, most), 1);
  }
}

TEST(Plan, SplitIsNearEqual) {
  for (int n : {0, 1, 15, 16, 17, 100, 28672}) {
    for (int parts : kSizes) {
      for (int align : {1, 16}) {
        int end = 0, least = 1 << 30, most = 0;
        for (int i = 0; i < parts; ++i) {
          const Range range = split(n, parts, i, align);
          EXPECT_EQ(range.begin, end);
          end = range.end;
          const int units = (range.size() + align - 1) / align;
          least = std::min(least, units), most = std::max(most, units);
        }
        EXPECT_EQ(end, n);
        EXPECT_LE(most - least, 1);
      }
    }
  }
}

TEST(Overlap, ChunksPartitionTheColumnsInOrder) {
  Random random(5);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<int> columns;
    for (int i = random.between(1, 3); i > 0; --i) columns.push_back(random.between(0, 200));
    const int chunks = num_rank_chunks(Exchange::kAllReduce, columns, random.between(1, 4));
    std::vector<int> next(columns.size(), 0);
    std::size_t last = 0;  // the linear of the columns before
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int units = 0;
      for (std::size_t i = 0; i < columns.size(); ++i) {
        const Range part = chunk_columns(columns, i, chunk, chunks);
        if (part.size() == 0) continue;
        EXPECT_GE(i, last);
        last = i;
        EXPECT_EQ(part.begin, next[i]);
        EXPECT_EQ(part.begin % kChunkColumns, 0);
        EXPECT_TRUE(part.end % kChunkColumns == 0 || part.end == columns[i]);
        next[i] = part.end;
        units += (part.size() + kChunkColumns - 1) / kChunkColumns;
      }
      EXPECT_GE(units, chunks > 1 ? 1 : 0);
    }
    EXPECT_EQ(next, columns);
  }
}

TEST(Overlap, CutsFewTokensByRankAndManyByTokens) {
  for (int tokens : {1, 7, kRankChunkTokens}) {
    EXPECT_EQ(overlap_of(tokens, 3).tile_tokens, tokens);
    EXPECT_EQ(overlap_of(tokens, 3).rank_chunks, 3);
    EXPECT_EQ(overlap_of(tokens, 64).rank_chunks, kMaxRankChunks);
  }
  EXPECT_EQ(overlap_of(kRankChunkTokens + 1, 3).tile_tokens, 43);
  EXPECT_EQ(overlap_of(kRankChunkTokens + 1, 3).rank_chunks, 1);
  EXPECT_EQ(overlap_of(160, 64).tile_tokens, kMinTileTokens);
  EXPECT_EQ(overlap_of(2 * kTileTokens, 1).tile_tokens, kTileTokens);
  EXPECT_EQ(overlap_of(2 * kTileTokens + 1, 1).tile_tokens, 342);
  EXPECT_EQ(overlap_of(2 * kTileTokens, 1, 4 * kTileTokens).tile_tokens, 2 * kTileTokens);
  // Gathered columns come from all over k; what is not exchanged after V has no chunks.
  const std::vector<int> columns{100, 100};
  EXPECT_EQ(num_rank_chunks(Exchange::kAllGather, columns, 4), 1);
  EXPECT_EQ(num_rank_chunks(Exchange::kNone, columns, 4), 1);
  EXPECT_EQ(num_rank_chunks(Exchange::kReduceScatter, columns, 4), 4);
}

TEST(Overlap, ChunksAreThoseOfTheNextSize) {
  const ExchangeChunks chunks{{{1, 2}, {16, 4}}};
  EXPECT_EQ(chunks.of(1), 2);
  EXPECT_EQ(chunks.of(2), 4);
  EXPECT_EQ(chunks.of(17), 4);
  EXPECT_EQ(ExchangeChunks{}.of(5), 1);
}

}  // namespace
}  // namespace deinfer

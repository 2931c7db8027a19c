#include "ops/batch.h"

#include <gtest/gtest.h>

namespace deinfer {
namespace {

/// Sequences of the given numbers of rows, the i-th at position 100 i; token ids are row numbers.
Batch batch_of(const std::vector<int>& rows) {
  Batch batch;
  for (int count : rows) {
    BatchSequence sequence;
    sequence.first_row = batch.num_tokens();
    sequence.num_rows = count;
    sequence.first_position = 100 * static_cast<int>(batch.sequences.size());
    batch.sequences.push_back(sequence);
    for (int i = 0; i < count; ++i) {
      batch.token_ids.push_back(batch.num_tokens());
      batch.positions.push_back(sequence.first_position + i);
    }
  }
  return batch;
}

TEST(WantedRows, AreEverySequencesFromTheFirstWantedOneOn) {
  Batch whole = batch_of({1, 5, 4, 3});  // rows 0, 1 .. 5, 6 .. 9, 10 .. 12
  whole.argmax_rows = {0, 5};
  whole.logit_rows = {11, 12};
  WantedRows wanted;
  wanted.select(batch_of({2}));  // nothing is left of an earlier batch
  EXPECT_EQ(wanted.batch.num_tokens(), 0);
  EXPECT_TRUE(wanted.batch.sequences.empty());
  wanted.select(whole);
  EXPECT_EQ(wanted.rows, (std::vector<int>{0, 5, 11, 12}));
  EXPECT_EQ(wanted.batch.token_ids, wanted.rows);
  EXPECT_EQ(wanted.batch.positions, (std::vector<int>{0, 104, 301, 302}));
  EXPECT_EQ(wanted.batch.argmax_rows, (std::vector<int>{0, 1}));
  EXPECT_EQ(wanted.batch.logit_rows, (std::vector<int>{2, 3}));
  ASSERT_EQ(wanted.batch.sequences.size(), 3u);
  const BatchSequence& last = wanted.batch.sequences[2];
  EXPECT_EQ(last.first_row, 2);
  EXPECT_EQ(last.num_rows, 2);
  EXPECT_EQ(last.first_position, 301);
}

TEST(WantedRows, KeepRowsBetweenWantedOnes) {
  Batch whole = batch_of({6});
  whole.argmax_rows = {5};
  whole.logit_rows = {2};
  WantedRows wanted;
  wanted.select(whole);
  EXPECT_EQ(wanted.rows, (std::vector<int>{2, 3, 4, 5}));
  EXPECT_EQ(wanted.batch.logit_rows, (std::vector<int>{0}));
  EXPECT_EQ(wanted.batch.argmax_rows, (std::vector<int>{3}));
}

}  // namespace
}  // namespace deinfer

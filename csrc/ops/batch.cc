#include "ops/batch.h"

#include <algorithm>

namespace deinfer {
namespace {

/// The first element of ascending rows that is at least `first`, or `end` if that is less.
int first_from(const std::vector<int>& rows, int first, int end) {
  auto it = std::lower_bound(rows.begin(), rows.end(), first);
  return it == rows.end() ? end : std::min(*it, end);
}

}  // namespace

void WantedRows::select(const Batch& whole) {
  rows.clear();
  batch.clear();
  for (BatchSequence sequence : whole.sequences) {
    const int end = sequence.first_row + sequence.num_rows;
    const int first = std::min(first_from(whole.logit_rows, sequence.first_row, end),
                               first_from(whole.argmax_rows, sequence.first_row, end));
    if (first == end) continue;
    sequence.first_position += first - sequence.first_row;
    sequence.first_row = batch.num_tokens();
    sequence.num_rows = end - first;
    batch.sequences.push_back(sequence);
    for (int row = first; row < end; ++row) {
      rows.push_back(row);
      batch.token_ids.push_back(whole.token_ids[static_cast<std::size_t>(row)]);
      batch.positions.push_back(whole.positions[static_cast<std::size_t>(row)]);
    }
  }
  auto renumber = [&](const std::vector<int>& from, std::vector<int>& to) {
    for (int row : from) {
      to.push_back(
          static_cast<int>(std::lower_bound(rows.begin(), rows.end(), row) - rows.begin()));
    }
  };
  renumber(whole.logit_rows, batch.logit_rows);
  renumber(whole.argmax_rows, batch.argmax_rows);
}

}  // namespace deinfer

// Static batches of sequences of similar expected length, as in arXiv 2305.13144.
#pragma once

#include <vector>

namespace deinfer {

/// How sequences are put into batches that nothing joins once they run.
struct StaticBatchConfig {
  int group = 256;      // sequences, by arrival, that are put into batches together
  int batch_size = 16;  // where no other size is given, and of batches that are recomputed
  bool sort = true;     // each group by expected length; else by arrival
  // Batches come from buckets of expected lengths, bucket i holding (i * bucket_tokens,
  // (i + 1) * bucket_tokens], and have the size bucket_batch_sizes[i], beyond its end batch_size.
  // 0: no buckets, every batch has batch_size sequences.
  int bucket_tokens = 50;
  std::vector<int> bucket_batch_sizes = {256, 128, 64, 32};
  // A sequence that outlives its bucket's upper bound (without buckets: the longest expected length
  // of its batch) is set aside and runs again, with no bound, at the end of its group.
  bool collect_failures = true;
  bool restart_failures = false;  // from its prompt, as in the paper; else its tokens are kept

  /// Batches in order of arrival that run until their last sequence ends.
  static StaticBatchConfig plain(int batch_size);
  /// Throws Error(kInvalidArgument) naming the field and its value.
  void validate() const;
};

}  // namespace deinfer

// Sampling of a step's rows on a CUDA device: its memory, and what comes back from it.
#pragma once

#include <span>

#include "kernels/cuda/runtime.h"
#include "kernels/cuda/sampling.h"

namespace deinfer {

class CudaSampling {
 public:
  /// Rows that one launch takes at most.
  static constexpr int kRows = 64;
  /// Tokens that the penalties of a step may need, and that its reports may list. What is beyond
  /// would take longer to copy than the logits of its rows.
  static constexpr int kHistoryTokens = 1 << 20;
  static constexpr int kReportedTokens = 1 << 16;

  /// For up to `max_tokens` rows of logits; `pool_words` is the size of the pool of launch().
  /// A vocabulary of 0 is that of ranks that do not sample.
  CudaSampling(int vocabulary, int max_tokens, std::size_t pool_words, cuda::DeviceStream& stream);

  /// Whether rows are sampled here at all.
  bool available() const { return vocabulary_ > 0 && vocabulary_ <= cuda::kMaxSampledVocabulary; }

  /// Samples rows first .. first + count of a step, whose logits[count, vocabulary] are given;
  /// samples and pool are the step's, in device memory.
  void launch(float* logits, const cuda::SampleRow* samples, const int* pool, int first, int count);
  /// Copies the results of `rows` rows, with `reported` tokens in all, to the host.
  void download(int rows, int reported);

  /// Of download(), once that is done.
  std::span<const cuda::SampledToken> tokens() const { return tokens_; }
  std::span<const cuda::ReportedToken> reported() const { return reported_; }

 private:
  int vocabulary_;
  cuda::DeviceStream& stream_;
  cuda::DeviceBuffer lists_, counts_, saved_;  // scratch; see cuda::SampleLaunch
  cuda::DeviceBuffer out_, reports_;
  cuda::PinnedBuffer host_out_, host_reports_;
  std::span<const cuda::SampledToken> tokens_;
  std::span<const cuda::ReportedToken> reported_;
};

}  // namespace deinfer

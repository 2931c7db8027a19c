#include "model/cuda_sampling.h"

#include "kernels/cpu/kernel_table.h"

namespace deinfer {

static_assert(cuda::kSumBlock == cpu::kSumBlock && cuda::kSumLanes == cpu::kLanes,
              "sums are those of the host");

CudaSampling::CudaSampling(int vocabulary, int max_tokens, std::size_t pool_words,
                           cuda::DeviceStream& stream)
    : vocabulary_(vocabulary), stream_(stream) {
  if (!available()) return;
  const auto row = std::size_t{kRows} * static_cast<std::size_t>(vocabulary) * sizeof(int);
  lists_ = cuda::DeviceBuffer(3 * row);
  counts_ = cuda::DeviceBuffer(row);
  stream_.clear(counts_);
  saved_ = cuda::DeviceBuffer(pool_words * sizeof(float));
  const std::size_t out_bytes = static_cast<std::size_t>(max_tokens) * sizeof(cuda::SampledToken);
  const std::size_t report_bytes = kReportedTokens * sizeof(cuda::ReportedToken);
  out_ = cuda::DeviceBuffer(out_bytes);
  reports_ = cuda::DeviceBuffer(report_bytes);
  host_out_ = cuda::PinnedBuffer(out_bytes);
  host_reports_ = cuda::PinnedBuffer(report_bytes);
}

void CudaSampling::launch(float* logits, const cuda::SampleRow* samples, const int* pool, int first,
                          int count) {
  cuda::SampleLaunch launch;
  launch.logits = logits;
  launch.rows = count;
  launch.vocabulary = vocabulary_;
  launch.samples = samples + first;
  launch.pool = pool;
  launch.saved = saved_.as<float>();
  launch.lists = lists_.as<int>();
  launch.counts = counts_.as<int>();
  launch.out = out_.as<cuda::SampledToken>() + first;
  launch.reports = reports_.as<cuda::ReportedToken>();
  cuda::check_launch(cuda::launch_sample(launch, stream_.get()), "sampling");
}

void CudaSampling::download(int rows, int reported) {
  tokens_ = {host_out_.as<cuda::SampledToken>(), static_cast<std::size_t>(rows)};
  reported_ = {host_reports_.as<cuda::ReportedToken>(), static_cast<std::size_t>(reported)};
  if (rows > 0) stream_.download(host_out_.as<void>(), out_.as<void>(), tokens_.size_bytes());
  if (reported > 0) {
    stream_.download(host_reports_.as<void>(), reports_.as<void>(), reported_.size_bytes());
  }
}

}  // namespace deinfer

// Threads and scratch of the operations.
#include "base/check.h"
#include "base/cpu_features.h"
#include "functional/executor_impl.h"

namespace deinfer {
namespace {

constexpr int kMostThreads = 1024;
// Multiplications that one thread does in about the time in which others wake up and meet.
constexpr std::int64_t kSerialWork = 400'000;

}  // namespace

OpExecutor::Impl::Impl()
    : kernels(cpu::kernels_for(select_isa())),
      alone(make_single_communicator(0)),
      exchange(*alone) {}

OpExecutor::Impl::Team& OpExecutor::Impl::team_of(int threads) {
  std::unique_ptr<Team>& team = teams[threads];
  if (team == nullptr) team = std::make_unique<Team>(threads);
  return *team;
}

AttentionSchedule& OpExecutor::Impl::schedule_of(const AttentionShape& shape, int threads) {
  constexpr std::size_t kMost = 8;
  for (const auto& known : schedules) {
    if (known->shape == shape && known->threads == threads) return known->schedule;
  }
  if (schedules.size() == kMost) schedules.erase(schedules.begin());
  schedules.push_back(std::make_unique<Schedule>(
      Schedule{shape, threads, AttentionSchedule(shape, DType::kFloat32, threads)}));
  const std::size_t bytes = attention_scratch_bytes(kernels, shape, DType::kFloat32);
  for (ThreadScratch& scratch : team_of(threads).scratch) {
    if (scratch.attention.size() < bytes) scratch.attention = Buffer(bytes);
  }
  return schedules.back()->schedule;
}

void check_matrix(const char* name, const void* data, std::int64_t rows, std::int64_t cols,
                  std::int64_t row_stride) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  check_argument(0 <= rows && rows <= kMost && 0 < cols && cols <= kMost, name, " has shape [",
                 rows, ", ", cols, "]");
  check_argument(rows <= 1 || row_stride >= cols, name, " has ", cols, " columns and row stride ",
                 row_stride);
  check_argument(data != nullptr || rows == 0, name, " has no data");
}

void check_threads(int threads) {
  check_argument(1 <= threads && threads <= kMostThreads, "threads must be in [1, ", kMostThreads,
                 "], not ", threads);
}

int worthwhile_threads(std::int64_t work, int threads) { return work < kSerialWork ? 1 : threads; }

OpExecutor::OpExecutor() : impl_(std::make_unique<Impl>()) {}

OpExecutor::~OpExecutor() = default;

}  // namespace deinfer

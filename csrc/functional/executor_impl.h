// What an OpExecutor owns: teams, scratch memory, attention schedules.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/communicator.h"
#include "deinfer/ops.h"
#include "functional/packed_format.h"
#include "ops/attention.h"
#include "ops/context.h"

namespace deinfer {

/// Memory for rows of activations; grows when more is asked for.
class Workspace {
 public:
  /// Its contents are undefined.
  Activations take(DType dtype, int rows, int cols) {
    const std::ptrdiff_t ld = activation_stride(dtype, cols);
    const std::size_t bytes =
        static_cast<std::size_t>(rows) * static_cast<std::size_t>(ld) * dtype_size(dtype);
    if (bytes > buffer_.size()) buffer_ = Buffer(bytes);
    return {buffer_.as<void>(), dtype, ld};
  }

 private:
  Buffer buffer_;
};

struct OpExecutor::Impl {
  // Other programs' threads want the cores too; between two operations of a model lie some tens of
  // microseconds.
  static constexpr int kWaitsBeforeSleep = 1500;

  struct Team {
    explicit Team(int threads)
        : team(threads, kWaitsBeforeSleep), scratch(static_cast<std::size_t>(threads)) {}
    ThreadTeam team;
    std::vector<ThreadScratch> scratch;
  };

  struct Schedule {
    AttentionShape shape;
    int threads = 0;
    AttentionSchedule schedule;
  };

  Team& team_of(int threads);
  /// f(ctx, rows, input, z, first row) for the tiles of x, on the threads that the work is worth.
  template <typename F>
  void for_tiles(const TensorView& x, const PackedLinears& packed, const LinearGroup& group,
                 int threads, F f);
  AttentionSchedule& schedule_of(const AttentionShape& shape, int threads);

  /// f(ExecutionContext&) on every member of a team.
  template <typename F>
  void run(int threads, F f) {
    Team& team = team_of(threads);
    auto body = [&](TeamMember& member) {
      ExecutionContext ctx{kernels, member, team.scratch[static_cast<std::size_t>(member.id())],
                           exchange};
      f(ctx);
    };
    team.team.run(std::ref(body));  // by reference: std::function then needs no memory of its own
  }

  const cpu::KernelTable& kernels;
  std::unique_ptr<Communicator> alone;
  TeamExchange exchange;
  std::mutex turn;  // held by whoever runs; guards what follows
  std::map<int, std::unique_ptr<Team>> teams;
  std::vector<std::unique_ptr<Schedule>> schedules;  // of the shapes that were last used
  Workspace x_copy, z_memory, q_floats;
  Batch batch;

  Impl();
};

/// Of a matrix argument: extents that fit, rows that do not overlap, memory where there are rows.
void check_matrix(const char* name, const void* data, std::int64_t rows, std::int64_t cols,
                  std::int64_t row_stride);
template <typename View>
void check_matrix(const char* name, const View& view) {
  check_matrix(name, view.data, view.rows, view.cols, view.row_stride);
}
void check_threads(int threads);
/// The threads that `work` multiplications are worth.
int worthwhile_threads(std::int64_t work, int threads);

/// Rows of a view as activations; what reads them does not write.
inline Activations activations_of(const TensorView& view) {
  return {const_cast<void*>(view.data), view.dtype, view.row_stride};
}
inline Activations activations_of(const MutableTensorView& view) {
  return {view.data, view.dtype, view.row_stride};
}

}  // namespace deinfer

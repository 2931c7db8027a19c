#include "base/thread_team.h"

#include <algorithm>
#include <optional>
#include <system_error>

#include "base/check.h"
#include "base/short_slices.h"

namespace deinfer {

void TeamBarrier::wait() {
  std::uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1);
    wake();
    return;
  }
  wait_until([&] { return generation_.load() != generation; });
}

void TeamBarrier::reset() {
  arrived_.store(0, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_release);
}

ThreadTeam::ThreadTeam(int size, int waits_before_sleep)
    : size_(size),
      waits_before_sleep_(waits_before_sleep),
      barrier_(size),
      queues_(static_cast<std::size_t>(std::max(size, 1))) {
  check_argument(size >= 1, "thread team: size must be at least 1, got ", size);
  errors_.resize(static_cast<std::size_t>(size));
  try {
    for (int id = 1; id < size; ++id) threads_.emplace_back([this, id] { work(id); });
  } catch (const std::system_error& error) {
    stop();
    fail(ErrorCode::kOutOfMemory, "thread team: cannot start thread ", threads_.size() + 1, " of ",
         size, ": ", error.what());
  }
}

ThreadTeam::~ThreadTeam() { stop(); }

void ThreadTeam::stop() {
  stop_.store(true, std::memory_order_release);
  epoch_.fetch_add(1);
  idle_.wake();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadTeam::execute(int id) {
  TeamMember member(id, size_, barrier_, queues_.data());
  try {
    (*task_)(member);
  } catch (const TeamAborted&) {
    // Another member failed and reports.
  } catch (...) {
    errors_[static_cast<std::size_t>(id)] = std::current_exception();
    barrier_.abort();
  }
}

void ThreadTeam::work(int id) {
  ShortSlices slices;
  std::uint32_t seen = 0;
  WaitManner manner;
  manner.spins = std::min(waits_before_sleep_, WaitManner::kSpins);
  manner.yields = waits_before_sleep_ - manner.spins;
  while (true) {
    idle_.wait([&] { return epoch_.load() != seen; }, manner);
    ++seen;
    if (stop_.load(std::memory_order_acquire)) return;
    execute(id);
    if (running_.fetch_sub(1) == 1) done_.wake();
  }
}

void ThreadTeam::run(const std::function<void(TeamMember&)>& fn) {
  task_ = &fn;
  running_.store(size_ - 1, std::memory_order_relaxed);
  if (size_ > 1) {
    epoch_.fetch_add(1);
    idle_.wake();
  }
  {
    std::optional<ShortSlices> slices;
    // It takes microseconds.
    if (size_ > 1 && WaitPlace::yields_were_long()) slices.emplace();
    execute(0);
    done_.wait([&] { return running_.load() == 0; });
  }
  task_ = nullptr;
  std::exception_ptr first;
  for (std::exception_ptr& error : errors_) {
    if (error && !first) first = error;
    error = nullptr;
  }
  if (first) {
    barrier_.reset();
    std::rethrow_exception(first);
  }
}

}  // namespace deinfer

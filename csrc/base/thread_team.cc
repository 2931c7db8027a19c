#include "base/thread_team.h"

#include <sched.h>

#include <algorithm>
#include <system_error>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr int kSpinsBeforeYield = 2000;
// A team between two steps of a busy engine waits microseconds; an idle one must not burn a core.
constexpr int kYieldsBeforeSleep = 2000;

inline void pause() { __builtin_ia32_pause(); }

}  // namespace

void SpinBarrier::wait() {
  std::uint32_t generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    return;
  }
  int spins = 0;
  while (generation_.load(std::memory_order_acquire) == generation) {
    if (aborted_.load(std::memory_order_acquire)) throw TeamAborted{};
    if (++spins < kSpinsBeforeYield) {
      pause();
    } else {
      sched_yield();
    }
  }
}

void SpinBarrier::reset() {
  arrived_.store(0, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_release);
}

ThreadTeam::ThreadTeam(int size)
    : size_(size), barrier_(size), queues_(static_cast<std::size_t>(std::max(size, 1))) {
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
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
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
  std::uint32_t seen = 0;
  while (true) {
    int waits = 0;
    while (epoch_.load(std::memory_order_acquire) == seen) {
      ++waits;
      if (waits < kSpinsBeforeYield) {
        pause();
      } else if (waits < kSpinsBeforeYield + kYieldsBeforeSleep) {
        sched_yield();
      } else {
        epoch_.wait(seen, std::memory_order_acquire);
      }
    }
    ++seen;
    if (stop_.load(std::memory_order_acquire)) return;
    execute(id);
    running_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

void ThreadTeam::run(const std::function<void(TeamMember&)>& fn) {
  task_ = &fn;
  running_.store(size_ - 1, std::memory_order_relaxed);
  if (size_ > 1) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  execute(0);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      sched_yield();
    }
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

// The threads of one rank: a team that runs one function on all of its members.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "base/wait_place.h"

namespace deinfer {

/// Thrown out of TeamMember::barrier() in the other members when one has failed.
struct TeamAborted {};

/// A barrier among a fixed number of threads.
class TeamBarrier {
 public:
  explicit TeamBarrier(int count) : count_(count) {}
  /// Throws TeamAborted when abort() was called.
  void wait();
  void abort() {
    aborted_.store(true);
    wake();
  }
  /// Waits for something else, which the others tell by wake(); see WaitPlace. Throws as wait().
  template <typename Ready>
  void wait_until(Ready ready, WaitManner manner = {}) {
    place_.wait(
        [&] {
          if (ready()) return true;
          if (aborted_.load()) throw TeamAborted{};
          return false;
        },
        manner);
  }
  void wake() { place_.wake(); }
  void reset();

 private:
  const int count_;
  std::atomic<bool> aborted_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  WaitPlace place_;
};

/// A member's part [begin, end) of some work: it takes items from the front, others from the back.
class WorkQueue {
 public:
  void fill(int begin, int end) { range_.store(pack(begin, end), std::memory_order_relaxed); }
  /// The next item, or -1 when none is left.
  int take_front() {
    return take([](std::uint64_t& begin, std::uint64_t&) { return begin++; });
  }
  int take_back() {
    return take([](std::uint64_t&, std::uint64_t& end) { return --end; });
  }

 private:
  static std::uint64_t pack(std::int64_t begin, std::int64_t end) {
    return static_cast<std::uint64_t>(begin) << 32 | static_cast<std::uint64_t>(end);
  }
  template <typename F>
  int take(F f) {
    // The items themselves are ordered by barriers; the queue only hands each out once.
    std::uint64_t range = range_.load(std::memory_order_relaxed);
    while (true) {
      std::uint64_t begin = range >> 32;
      std::uint64_t end = range & 0xffffffffu;
      if (begin >= end) return -1;
      auto item = static_cast<int>(f(begin, end));
      if (range_.compare_exchange_weak(range, begin << 32 | end, std::memory_order_relaxed)) {
        return item;
      }
    }
  }

  alignas(64) std::atomic<std::uint64_t> range_{0};
};

/// What a function running on a team knows about its place in it.
class TeamMember {
 public:
  TeamMember(int id, int size, TeamBarrier& barrier, WorkQueue* queues)
      : id_(id), size_(size), barrier_(barrier), queues_(queues) {}
  int id() const { return id_; }
  int size() const { return size_; }
  /// Every member must call it the same number of times. Memory written before is visible after.
  void barrier() {
    if (size_ > 1) barrier_.wait();
  }
  /// Returns when ready() holds, which other members make true and then call wake_others(); memory
  /// orders as for WaitPlace::wait().
  template <typename Ready>
  void wait_until(Ready ready, WaitManner manner = {}) const {
    barrier_.wait_until(ready, manner);
  }
  void wake_others() const { barrier_.wake(); }
  /// This member's part [first, last) of n equal items.
  std::pair<int, int> share(int n) const {
    return {static_cast<int>(std::int64_t{n} * id_ / size_),
            static_cast<int>(std::int64_t{n} * (id_ + 1) / size_)};
  }
  /// f(item) for the items of this member's share [begin, end), ascending, and then for items that
  /// other members have not come to: a member that the OS or its memory slows down holds the team
  /// up by one item at most. Items are not negative. A barrier must lie between two calls.
  template <typename F>
  void work(int begin, int end, F f) {
    if (size_ == 1) {
      for (int item = begin; item < end; ++item) f(item);
      return;
    }
    WorkQueue& own = queues_[id_];
    own.fill(begin, end);
    for (int item; (item = own.take_front()) >= 0;) f(item);
    for (int i = 1; i < size_; ++i) {
      WorkQueue& other = queues_[(id_ + i) % size_];
      for (int item; (item = other.take_back()) >= 0;) f(item);
    }
  }

 private:
  int id_;
  int size_;
  TeamBarrier& barrier_;
  WorkQueue* queues_;  // one per member
};

/// `size` threads: the caller of run() is member 0, the others wait (awake, then asleep) between
/// calls. One thread at a time may call run().
class ThreadTeam {
 public:
  /// A team between two steps of a busy engine waits microseconds; an idle one must not burn a
  /// core.
  static constexpr int kWaitsBeforeSleep = WaitManner::kSpins + 2000;

  /// A thread that has nothing to do looks `waits_before_sleep` times before it sleeps. Throws
  /// kInvalidArgument when size < 1, kOutOfMemory when the OS gives no more threads.
  explicit ThreadTeam(int size, int waits_before_sleep = kWaitsBeforeSleep);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }
  /// Runs fn on every member and returns when all are done. The first exception thrown by a member
  /// releases the others from their barriers and is rethrown here; the team stays usable.
  void run(const std::function<void(TeamMember&)>& fn);

 private:
  void stop();
  void work(int id);
  void execute(int id);

  const int size_;
  const int waits_before_sleep_;
  TeamBarrier barrier_;
  std::vector<WorkQueue> queues_;
  const std::function<void(TeamMember&)>* task_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  WaitPlace idle_;
  alignas(64) std::atomic<int> running_{0};
  WaitPlace done_;
  std::atomic<bool> stop_{false};
  std::vector<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

}  // namespace deinfer

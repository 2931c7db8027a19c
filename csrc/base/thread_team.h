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

namespace deinfer {

/// Thrown out of TeamMember::barrier() in the other members when one has failed.
struct TeamAborted {};

/// A barrier among a fixed number of threads: spins, then yields.
class SpinBarrier {
 public:
  explicit SpinBarrier(int count) : count_(count) {}
  /// Throws TeamAborted when abort() was called.
  void wait();
  void abort() { aborted_.store(true, std::memory_order_release); }
  void reset();

 private:
  const int count_;
  std::atomic<bool> aborted_{false};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

/// What a function running on a team knows about its place in it.
class TeamMember {
 public:
  TeamMember(int id, int size, SpinBarrier& barrier) : id_(id), size_(size), barrier_(barrier) {}
  int id() const { return id_; }
  int size() const { return size_; }
  /// Every member must call it the same number of times. Memory written before is visible after.
  void barrier() {
    if (size_ > 1) barrier_.wait();
  }
  /// This member's part [first, last) of n equal items.
  std::pair<int, int> share(int n) const {
    return {static_cast<int>(std::int64_t{n} * id_ / size_),
            static_cast<int>(std::int64_t{n} * (id_ + 1) / size_)};
  }

 private:
  int id_;
  int size_;
  SpinBarrier& barrier_;
};

/// `size` threads: the caller of run() is member 0, the others wait (spinning, then asleep)
/// between calls. One thread at a time may call run().
class ThreadTeam {
 public:
  /// Throws kInvalidArgument when size < 1.
  explicit ThreadTeam(int size);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return size_; }
  /// Runs fn on every member and returns when all are done. The first exception thrown by a member
  /// releases the others from their barriers and is rethrown here; the team stays usable.
  void run(const std::function<void(TeamMember&)>& fn);

 private:
  void work(int id);
  void execute(int id);

  const int size_;
  SpinBarrier barrier_;
  const std::function<void(TeamMember&)>* task_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

}  // namespace deinfer

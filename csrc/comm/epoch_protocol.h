// How ranks hand the slots of their rings to each other: two counters per rank, nothing else.
//
// Exchange e = 0, 1, ... uses slot e % ring of every rank. A rank
//   1. waits until slot_is_free(r, e) for every rank r: r has finished exchange e - ring;
//   2. writes its slot;
//   3. start(rank, e);
//   4. waits until has_started(r, e) for every rank r;
//   5. reads the slots of all ranks;
//   6. finish(rank, e).
// Steps 1-3 of later exchanges may come before step 4 of earlier ones, as long as at most `ring`
// exchanges are under way. Each counter has one writer and only grows, so that no rank need see
// several counters at one moment. tests/cpp/communicator_protocol_test.cc runs this very code
// through all interleavings, with a counter type that models release and acquire.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace deinfer {

template <typename Counter = std::atomic<std::uint64_t>>
class EpochProtocol {
 public:
  EpochProtocol(int ranks, int ring)
      : ring_(static_cast<std::uint64_t>(ring)), counters_(static_cast<std::size_t>(ranks)) {}

  /// Whether `reader` has finished the exchange that used the slot of exchange `epoch` before. Its
  /// reads are then over.
  bool slot_is_free(int reader, std::uint64_t epoch) const {
    return of(reader).finished.load(std::memory_order_acquire) + ring_ > epoch;
  }
  /// Hands over what this rank has written for exchange `epoch`.
  void start(int rank, std::uint64_t epoch) {
    of(rank).started.store(epoch + 1, std::memory_order_release);
  }
  /// Whether `writer` has started exchange `epoch`. What it wrote is then visible.
  bool has_started(int writer, std::uint64_t epoch) const {
    return of(writer).started.load(std::memory_order_acquire) > epoch;
  }
  /// This rank reads no more of exchange `epoch`.
  void finish(int rank, std::uint64_t epoch) {
    of(rank).finished.store(epoch + 1, std::memory_order_release);
  }

 private:
  // Pairs of cache lines, as CPUs prefetch them.
  struct Counters {
    alignas(128) Counter started{};   // exchanges
    alignas(128) Counter finished{};  // exchanges
  };
  Counters& of(int rank) { return counters_[static_cast<std::size_t>(rank)]; }
  const Counters& of(int rank) const { return counters_[static_cast<std::size_t>(rank)]; }

  std::uint64_t ring_;
  std::vector<Counters> counters_;
};

}  // namespace deinfer

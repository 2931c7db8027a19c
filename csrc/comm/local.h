// Ranks that are threads, or teams of threads, of one process.
#pragma once

#include <cstddef>
#include <memory>

#include "comm/communicator.h"

namespace deinfer {

/// A group of ranks that read each other's contributions where they were written, without copies.
/// Each rank has kMaxInFlight slots of max_bytes; their pages are taken where that rank first
/// writes them. Communicators may outlive the group.
class LocalGroup {
 public:
  /// Throws kInvalidArgument when size is not in [1, kMaxRanks] or max_bytes is absurd, and
  /// kOutOfMemory.
  LocalGroup(int size, std::size_t max_bytes);

  int size() const;
  /// The end of rank `rank`; any thread may take it, and use it as Communicator says. Throws
  /// kInvalidArgument for a rank out of range or one that was taken before.
  std::unique_ptr<Communicator> communicator(int rank);
  /// As Communicator::abort().
  void abort();

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace deinfer

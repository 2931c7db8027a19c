// A rank's exchanges with the others, made by its whole team.
#pragma once

#include <array>
#include <atomic>

#include "base/thread_team.h"
#include "comm/communicator.h"

namespace deinfer {

/// One per rank, shared by its team. Every member makes the same calls with the same arguments and
/// its own `member`; a member writes its part of send(), all start(), wait(), read their parts of
/// from(), and finish(). Two exchanges may overlap: start() of the second before finish() of the
/// first.
class TeamExchange {
 public:
  explicit TeamExchange(Communicator& communicator) : communicator_(communicator) {}

  int rank() const { return communicator_.rank(); }
  int size() const { return communicator_.size(); }
  std::size_t max_bytes() const { return communicator_.max_bytes(); }

  /// Call it on one thread before the team runs. Returns the ticket of the next exchange, from
  /// which every member counts.
  Ticket prepare() {
    acquire();
    return ready_.load(std::memory_order_relaxed);
  }

  /// This rank's contribution to the exchange `ticket`.
  std::byte* send(const TeamMember& member, Ticket ticket) const {
    // Member 0 publishes it just after it has started the exchange before.
    while (ready_.load(std::memory_order_acquire) < ticket) member.check_abort();
    return slots_[ticket % slots_.size()];
  }

  /// Starts the next exchange when all members have written their parts of its `bytes`.
  void start(TeamMember& member, Collective kind, std::size_t bytes) {
    member.barrier();
    if (member.id() != 0) return;
    communicator_.start(kind, bytes);
    acquire();
  }

  /// Returns when all ranks have started the exchange.
  void wait(const TeamMember& member, Ticket ticket) {
    while (ready_.load(std::memory_order_acquire) <= ticket) member.check_abort();
    communicator_.wait(ticket);
  }
  const std::byte* from(int rank, Ticket ticket) const {
    return communicator_.contribution_of(rank, ticket);
  }

  /// All members have read what they need; what each has written is visible to all.
  void finish(TeamMember& member, Ticket ticket) {
    member.barrier();
    if (member.id() == 0) communicator_.finish(ticket);
  }

 private:
  void acquire() {
    Ticket next = communicator_.next_ticket();
    slots_[next % slots_.size()] = communicator_.contribution(communicator_.max_bytes());
    ready_.store(next, std::memory_order_release);
  }

  Communicator& communicator_;
  std::array<std::byte*, Communicator::kMaxInFlight + 1> slots_{};
  std::atomic<Ticket> ready_{0};
};

}  // namespace deinfer

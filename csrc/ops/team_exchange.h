// A rank's exchanges with the others, made by its whole team.
#pragma once

#include <atomic>

#include "base/thread_team.h"
#include "comm/communicator.h"

namespace deinfer {

/// One per rank, shared by its team. Every member makes the same calls with the same arguments and
/// its own `member`; a member writes its part of send(), all start(), wait(), read their parts of
/// from(), and finish(). Exchanges may overlap: start() of later ones before finish() of earlier
/// ones, Communicator::kMaxInFlight in all.
class TeamExchange {
 public:
  explicit TeamExchange(Communicator& communicator) : communicator_(communicator) {}

  int rank() const { return communicator_.rank(); }
  int size() const { return communicator_.size(); }
  std::size_t max_bytes() const { return communicator_.max_bytes(); }

  /// The ticket of the next exchange, from which every member counts. Call it on one thread before
  /// the team runs.
  Ticket next_ticket() const { return communicator_.next_ticket(); }

  /// This rank's contribution to the exchange `ticket`, the next to be started.
  std::byte* send(const TeamMember& member, Ticket ticket) {
    if (member.id() == 0 && sendable_.load(std::memory_order_relaxed) <= ticket) {
      slot_ = communicator_.contribution(communicator_.max_bytes());
      sendable_.store(ticket + 1, std::memory_order_release);
      member.wake_others();
    }
    wait_beyond(sendable_, member, ticket);
    return slot_;
  }

  /// Starts the next exchange when all members have written their parts of its `bytes`.
  void start(TeamMember& member, Collective kind, std::size_t bytes) {
    member.barrier();
    if (member.id() != 0) return;
    Ticket ticket = communicator_.start(kind, bytes);
    started_.store(ticket + 1, std::memory_order_release);
    member.wake_others();
  }

  /// Returns when all ranks have started the exchange.
  void wait(const TeamMember& member, Ticket ticket) {
    wait_beyond(started_, member, ticket);
    communicator_.wait(ticket);
  }
  const std::byte* from(int rank, Ticket ticket) const {
    return communicator_.contribution_of(rank, ticket);
  }

  /// All members have read what they need of the exchanges [ticket, ticket + count); what each has
  /// written is visible to all.
  void finish(TeamMember& member, Ticket ticket, int count = 1) {
    member.barrier();
    if (member.id() != 0) return;
    for (int i = 0; i < count; ++i) communicator_.finish(ticket + static_cast<Ticket>(i));
  }

 private:
  static void wait_beyond(const std::atomic<Ticket>& count, const TeamMember& member,
                          Ticket ticket) {
    WaitManner manner;
    manner.longest_sleep = Communicator::kLongestSleep;
    member.wait_until([&] { return count.load(std::memory_order_acquire) > ticket; }, manner);
  }

  Communicator& communicator_;
  std::byte* slot_ = nullptr;        // of the exchange sendable_ - 1
  std::atomic<Ticket> sendable_{0};  // exchanges whose slots member 0 has taken
  std::atomic<Ticket> started_{0};   // exchanges
};

}  // namespace deinfer

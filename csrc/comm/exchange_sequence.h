// Where one rank stands in the sequence of its exchanges, and the errors of those who leave it.
#pragma once

#include <atomic>
#include <cstddef>
#include <optional>

#include "base/check.h"
#include "comm/communicator.h"

namespace deinfer {

/// Every function throws kInvalidArgument for a call out of order. check_started() and
/// check_under_way() may be called by any thread, the others by one at a time.
class ExchangeSequence {
 public:
  explicit ExchangeSequence(std::size_t max_bytes) : max_bytes_(max_bytes) {}

  /// For contribution(): the next ticket.
  Ticket prepare(std::size_t bytes) {
    check_argument(bytes <= max_bytes_, "communicator: a contribution may have at most ",
                   max_bytes_, " bytes, got ", bytes);
    Ticket next = this->next();
    Ticket finished = finished_.load(std::memory_order_relaxed);
    check_argument(next - finished < Communicator::kMaxInFlight, "communicator: ", next - finished,
                   " exchanges are under way, the most that may be; finish one first");
    prepared_ = bytes;
    return next;
  }

  /// The ticket of the next start().
  Ticket next() const { return started_.load(std::memory_order_relaxed); }

  /// For start(): the ticket.
  Ticket start(std::size_t bytes) {
    check_argument(prepared_.has_value(), "communicator: start() without contribution()");
    check_argument(bytes <= *prepared_, "communicator: contribution() was for ", *prepared_,
                   " bytes, start() got ", bytes);
    prepared_.reset();
    return started_.fetch_add(1, std::memory_order_relaxed);
  }

  /// For wait(), which would never return.
  void check_started(Ticket ticket) const {
    Ticket started = next();
    check_argument(ticket < started, "communicator: exchange ", ticket, " was not started; ",
                   started, " were");
  }

  /// For contribution_of().
  void check_under_way(Ticket ticket) const {
    check_started(ticket);
    check_argument(ticket >= finished_.load(std::memory_order_relaxed), "communicator: exchange ",
                   ticket, " is finished; its contributions may be gone");
  }

  void finish(Ticket ticket) {
    check_started(ticket);
    Ticket oldest = finished_.load(std::memory_order_relaxed);
    check_argument(ticket == oldest, "communicator: exchanges are finished in order; the next is ",
                   oldest, ", got ", ticket);
    finished_.store(ticket + 1, std::memory_order_relaxed);
  }

 private:
  const std::size_t max_bytes_;
  std::optional<std::size_t> prepared_;  // bytes
  std::atomic<Ticket> started_{0};       // exchanges
  std::atomic<Ticket> finished_{0};      // exchanges
};

}  // namespace deinfer

#include "comm/emulated_link.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"

namespace deinfer {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

// Sleeping threads wake up to 50 us (the kernel's timer slack) and a context switch late.
constexpr nanoseconds kSleepUntilBefore = std::chrono::microseconds(100);

/// What every contribution begins with.
struct Header {
  nanoseconds started;  // on the steady clock, which all ranks share
  std::size_t bytes;
  Collective kind;
};
constexpr std::size_t kHeaderBytes = kEmulatedLinkHeaderBytes;
static_assert(sizeof(Header) <= kHeaderBytes);

class EmulatedLink final : public Communicator {
 public:
  EmulatedLink(std::unique_ptr<Communicator> inner, const LinkModel& link)
      : inner_(std::move(inner)), link_(link) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::size_t max_bytes() const override { return inner_->max_bytes() - kHeaderBytes; }

  std::byte* contribution(std::size_t bytes) override {
    check_argument(bytes <= max_bytes(), "communicator: a contribution may have at most ",
                   max_bytes(), " bytes, got ", bytes);
    slot_ = inner_->contribution(kHeaderBytes + bytes);
    return slot_ + kHeaderBytes;
  }

  Ticket next_ticket() const override { return inner_->next_ticket(); }

  Ticket start(Collective kind, std::size_t bytes) override {
    check_argument(slot_ != nullptr, "communicator: start() without contribution()");
    Header header{Clock::now().time_since_epoch(), bytes, kind};
    std::memcpy(slot_, &header, sizeof(header));
    Ticket ticket = inner_->start(kind, kHeaderBytes + bytes);
    slot_ = nullptr;
    count(kind, bytes);
    return ticket;
  }

  void wait(Ticket ticket) override {
    inner_->wait(ticket);
    Clock::time_point end{end_of(ticket)};
    while (true) {
      nanoseconds left = end - Clock::now();
      if (left <= nanoseconds::zero()) return;
      if (left > 2 * kSleepUntilBefore) {
        std::this_thread::sleep_for(std::min(left - kSleepUntilBefore, kLongestSleep));
      } else {
        sched_yield();
      }
      inner_->wait(ticket);  // throws when the group was aborted
    }
  }

  const std::byte* contribution_of(int rank, Ticket ticket) const override {
    return inner_->contribution_of(rank, ticket) + kHeaderBytes;
  }

  void finish(Ticket ticket) override {
    // Later exchanges begin where this one ends, whether anyone has asked for it or not.
    inner_->wait(ticket);
    end_of(ticket);
    inner_->finish(ticket);
  }

  void abort() override { inner_->abort(); }

 private:
  /// When an exchange that all ranks have started ends: the same on all of them, as it follows from
  /// the headers alone.
  nanoseconds end_of(Ticket ticket) {
    std::lock_guard lock(mutex_);
    for (; timed_ <= ticket; ++timed_) {
      nanoseconds started{0};
      std::size_t bytes = 0;
      Header header{};
      for (int other = 0; other < size(); ++other) {
        std::memcpy(&header, inner_->contribution_of(other, timed_), sizeof(header));
        started = std::max(started, header.started);
        bytes = std::max(bytes, header.bytes);
      }
      // The next exchange's data follow at once; only data occupy the link, latency does not.
      double seconds = exchange_seconds(link_, header.kind, bytes, size());
      double occupied = exchange_seconds({0, link_.bytes_per_s}, header.kind, bytes, size());
      nanoseconds begin = std::max(started, link_free_);
      link_free_ = begin + nanoseconds(std::llround(occupied * 1e9));
      ends_[timed_ % kMaxInFlight] = begin + nanoseconds(std::llround(seconds * 1e9));
    }
    // A ticket of long ago: finished.
    if (ticket + kMaxInFlight < timed_) return nanoseconds::zero();
    return ends_[ticket % kMaxInFlight];
  }

  std::unique_ptr<Communicator> inner_;
  const LinkModel link_;
  std::byte* slot_ = nullptr;  // between contribution() and start()
  std::mutex mutex_;           // of what follows
  Ticket timed_ = 0;           // exchanges whose ends are known
  nanoseconds link_free_{0};   // when the data of the last of them are through, steady clock
  std::array<nanoseconds, kMaxInFlight> ends_{};
};

}  // namespace

std::unique_ptr<Communicator> make_emulated_link(std::unique_ptr<Communicator> inner,
                                                 const LinkModel& link) {
  check_link(link, str_cat(link.latency_s * 1e6, ":", link.bytes_per_s * 1e-9));
  check_argument(inner->max_bytes() >= kHeaderBytes,
                 "link: the communicator must have contributions of at least ", kHeaderBytes,
                 " bytes, it has ", inner->max_bytes());
  return std::make_unique<EmulatedLink>(std::move(inner), link);
}

}  // namespace deinfer

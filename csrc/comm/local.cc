#include "comm/local.h"

#include <atomic>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/short_slices.h"
#include "base/wait_place.h"
#include "comm/epoch_protocol.h"
#include "comm/exchange_sequence.h"

namespace deinfer {
namespace {

constexpr int kRing = Communicator::kMaxInFlight;
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kMostBytes = std::numeric_limits<std::size_t>::max() / (4 * kRing);

/// A rank that spins on a core another rank needs only delays itself. A yield hands the core on for
/// less than it takes to sleep and be woken, and with short slices loses it to other programs for
/// no longer than is fair.
WaitManner manner_for(int ranks) {
  auto cores = static_cast<int>(std::thread::hardware_concurrency());
  WaitManner manner;
  manner.longest_sleep = Communicator::kLongestSleep;
  if (ranks <= cores) return manner;
  manner.spins /= 100;
  manner.through_long_yields = ShortSlices::known();
  return manner;
}

}  // namespace

struct LocalGroup::State {
  State(int ranks, std::size_t bytes)
      : size(ranks),
        max_bytes(bytes),
        slot_bytes((bytes + kAlignment - 1) / kAlignment * kAlignment),
        manner(manner_for(ranks)),
        protocol(ranks, kRing),
        taken(static_cast<std::size_t>(ranks)) {
    for (int rank = 0; rank < ranks; ++rank) rings.emplace_back(kRing * slot_bytes);
  }

  std::byte* slot(int rank, Ticket ticket) {
    return rings[static_cast<std::size_t>(rank)].as<std::byte>() + ticket % kRing * slot_bytes;
  }

  void check_abort() const {
    if (aborted.load()) throw CommunicatorAborted{};
  }
  void abort() {
    aborted.store(true);
    place.wake();
  }

  /// Returns when ready(rank) holds for every rank.
  template <typename Ready>
  void wait_for_all(Ready ready) {
    int rank = 0;
    place.wait(
        [&] {
          check_abort();
          while (rank < size && ready(rank)) ++rank;
          return rank == size;
        },
        manner);
  }
  /// To follow a store that may make ready(rank) true. Of ranks that come one after the other, the
  /// last wakes the sleepers; those that come at once may not see each other (kLongestSleep).
  template <typename Ready>
  void wake_if_all(Ready ready) {
    if (!place.has_sleepers()) return;
    for (int rank = 0; rank < size; ++rank) {
      if (!ready(rank)) return;
    }
    place.wake();
  }

  const int size;
  const std::size_t max_bytes;
  const std::size_t slot_bytes;
  const WaitManner manner;
  std::vector<Buffer> rings;  // of each rank
  EpochProtocol<> protocol;
  alignas(128) std::atomic<bool> aborted{false};  // read by all, written once
  WaitPlace place;
  std::mutex mutex;
  std::vector<bool> taken;  // under the mutex
};

namespace {

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<LocalGroup::State> state, int rank)
      : state_(std::move(state)), rank_(rank), sequence_(state_->max_bytes) {}

  int rank() const override { return rank_; }
  int size() const override { return state_->size; }
  std::size_t max_bytes() const override { return state_->max_bytes; }

  std::byte* contribution(std::size_t bytes) override {
    state_->check_abort();  // ahead of errors that follow from an abort
    Ticket ticket = sequence_.prepare(bytes);
    state_->wait_for_all([&](int rank) { return state_->protocol.slot_is_free(rank, ticket); });
    return state_->slot(rank_, ticket);
  }

  Ticket next_ticket() const override { return sequence_.next(); }

  Ticket start(Collective kind, std::size_t bytes) override {
    Ticket ticket = sequence_.start(bytes);
    count(kind, bytes);
    state_->protocol.start(rank_, ticket);
    state_->wake_if_all([&](int rank) { return state_->protocol.has_started(rank, ticket); });
    return ticket;
  }

  void wait(Ticket ticket) override {
    sequence_.check_started(ticket);
    state_->wait_for_all([&](int rank) { return state_->protocol.has_started(rank, ticket); });
  }

  const std::byte* contribution_of(int rank, Ticket ticket) const override {
    check_argument(rank >= 0 && rank < state_->size, "communicator: there is no rank ", rank,
                   " among ", state_->size);
    sequence_.check_under_way(ticket);
    return state_->slot(rank, ticket);
  }

  void finish(Ticket ticket) override {
    sequence_.finish(ticket);
    state_->protocol.finish(rank_, ticket);
    state_->wake_if_all(
        [&](int rank) { return state_->protocol.slot_is_free(rank, ticket + kRing); });
  }

  void abort() override { state_->abort(); }

 private:
  std::shared_ptr<LocalGroup::State> state_;
  const int rank_;
  ExchangeSequence sequence_;
};

}  // namespace

LocalGroup::LocalGroup(int size, std::size_t max_bytes) {
  check_argument(size >= 1 && size <= Communicator::kMaxRanks, "local group: size must be 1 to ",
                 Communicator::kMaxRanks, ", got ", size);
  check_argument(max_bytes <= kMostBytes, "local group: max_bytes may be at most ", kMostBytes,
                 ", got ", max_bytes);
  state_ = std::make_shared<State>(size, max_bytes);
}

int LocalGroup::size() const { return state_->size; }

std::unique_ptr<Communicator> LocalGroup::communicator(int rank) {
  check_argument(rank >= 0 && rank < state_->size, "local group: there is no rank ", rank,
                 " among ", state_->size);
  std::lock_guard lock(state_->mutex);
  std::vector<bool>::reference taken = state_->taken[static_cast<std::size_t>(rank)];
  check_argument(!taken, "local group: rank ", rank, " was taken before");
  taken = true;
  return std::make_unique<LocalCommunicator>(state_, rank);
}

void LocalGroup::abort() { state_->abort(); }

}  // namespace deinfer

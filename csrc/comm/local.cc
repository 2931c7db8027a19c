#include "comm/local.h"

#include <atomic>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/spin_wait.h"
#include "comm/epoch_protocol.h"
#include "comm/exchange_sequence.h"

namespace deinfer {
namespace {

constexpr int kRing = Communicator::kMaxInFlight;
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kMostBytes = std::numeric_limits<std::size_t>::max() / (4 * kRing);

/// A rank that spins on a core another rank needs only delays itself.
int spins_for(int ranks) {
  auto cores = static_cast<int>(std::thread::hardware_concurrency());
  return ranks <= cores ? SpinWait::kSpinsBeforeYield : SpinWait::kSpinsBeforeYield / 100;
}

}  // namespace

struct LocalGroup::State {
  State(int ranks, std::size_t bytes)
      : size(ranks),
        max_bytes(bytes),
        slot_bytes((bytes + kAlignment - 1) / kAlignment * kAlignment),
        spins(spins_for(ranks)),
        protocol(ranks, kRing),
        taken(static_cast<std::size_t>(ranks)) {
    for (int rank = 0; rank < ranks; ++rank) rings.emplace_back(kRing * slot_bytes);
  }

  std::byte* slot(int rank, Ticket ticket) {
    return rings[static_cast<std::size_t>(rank)].as<std::byte>() + ticket % kRing * slot_bytes;
  }

  void check_abort() const {
    if (aborted.load(std::memory_order_acquire)) throw CommunicatorAborted{};
  }

  /// Returns when ready(rank) holds for every rank.
  template <typename Ready>
  void wait_for_all(Ready ready) const {
    check_abort();
    SpinWait spin(spins);
    for (int rank = 0; rank < size; ++rank) {
      while (!ready(rank)) {
        spin.once();
        check_abort();
      }
    }
  }

  const int size;
  const std::size_t max_bytes;
  const std::size_t slot_bytes;
  const int spins;
  std::vector<Buffer> rings;  // of each rank
  EpochProtocol<> protocol;
  alignas(128) std::atomic<bool> aborted{false};  // read by all, written once
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
  }

  void abort() override { state_->aborted.store(true, std::memory_order_release); }

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

void LocalGroup::abort() { state_->aborted.store(true, std::memory_order_release); }

}  // namespace deinfer

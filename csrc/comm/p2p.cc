#include "comm/p2p.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>

#include "base/check.h"
#include "kernels/cuda/devices.h"

namespace deinfer {
namespace {

constexpr int kMostBlocks = 32;  // of a kernel that waits

/// Device memory of a rank.
struct RankMemory {
  cuda::DeviceBuffer contributions;  // two
  cuda::DeviceBuffer counters;       // heard[kMaxPeers], epoch, arrived, failed
  cuda::PinnedBuffer fault;
  std::size_t contribution_bytes = 0;
};

/// Of all ranks; what one of them has allocated may be read until the last has gone.
struct State {
  std::vector<int> devices;
  ExchangeOptions options;
  std::vector<RankMemory> ranks;  // each written by its rank, before a barrier of all
  cuda::PinnedBuffer abort_word;  // by rank 0, likewise
  // Read by kernels; abort() may come before it is there.
  std::atomic<unsigned*> aborted{nullptr};
  std::atomic<bool> host_aborted{false};
  // Of lockstep: rank `turn` runs.
  std::mutex mutex;
  std::condition_variable changed;
  int turn = 0;  // under the mutex

  bool is_aborted() const {
    if (host_aborted.load(std::memory_order_acquire)) return true;
    unsigned* word = aborted.load(std::memory_order_acquire);
    return word != nullptr && std::atomic_ref(*word).load(std::memory_order_acquire) != 0;
  }
};

class P2pCommunicator final : public DeviceCommunicator {
 public:
  P2pCommunicator(std::shared_ptr<State> state, std::unique_ptr<Communicator> host)
      : DeviceCommunicator(std::move(host), state->options), state_(std::move(state)) {}

  void abort() override;
  void open(std::size_t bytes, cuda::DeviceStream& stream) override;
  void begin_turn() override;
  void end_turn() override;
  bool lockstep() const override { return options().lockstep; }
  void make_even() override;
  void synchronize() override;

 private:
  void transfer(Collective kind, const char* name, const Extent& extent,
                const Receive& receive) override;
  void wait_turn();
  void pass_turn();
  RankMemory& memory_of(int rank) { return state_->ranks[static_cast<std::size_t>(rank)]; }

  std::shared_ptr<State> state_;
  cuda::PeerExchange peers_;  // but for `parts`
};

void P2pCommunicator::abort() {
  {
    std::lock_guard lock(state_->mutex);
    state_->host_aborted.store(true, std::memory_order_release);
  }
  unsigned* word = state_->aborted.load(std::memory_order_acquire);
  if (word != nullptr) std::atomic_ref(*word).store(1, std::memory_order_release);
  state_->changed.notify_all();
  abort_host();
}

void P2pCommunicator::open(std::size_t bytes, cuda::DeviceStream& own_stream) {
  const int device = state_->devices[static_cast<std::size_t>(rank())];
  RankMemory& memory = memory_of(rank());
  memory.contribution_bytes = aligned(bytes);
  memory.contributions = cuda::DeviceBuffer(2 * memory.contribution_bytes);
  memory.counters = cuda::DeviceBuffer((cuda::kMaxPeers + 3) * sizeof(unsigned));
  memory.fault = cuda::PinnedBuffer(sizeof(cuda::ExchangeFault));
  *memory.fault.as<cuda::ExchangeFault>() = {};
  use(own_stream, memory.contributions.as<std::byte>(), memory.contribution_bytes);
  stream().clear(memory.contributions);
  stream().clear(memory.counters);
  stream().synchronize();
  if (rank() == 0) {
    state_->abort_word = cuda::PinnedBuffer(sizeof(unsigned));
    *state_->abort_word.as<unsigned>() = state_->host_aborted ? 1 : 0;
    state_->aborted.store(state_->abort_word.as<unsigned>(), std::memory_order_release);
  }
  host_barrier();
  peers_.rank = rank();
  peers_.size = size();
  int on_device = 0;
  for (int r = 0; r < size(); ++r) {
    const RankMemory& theirs = memory_of(r);
    const int other = state_->devices[static_cast<std::size_t>(r)];
    if (other != device) cuda::read_memory_of(other);
    on_device += other == device ? 1 : 0;
    if (theirs.contribution_bytes != memory.contribution_bytes) {
      fail(ErrorCode::kInternal, "ranks ", rank(), " and ", r, " exchange ",
           memory.contribution_bytes, " and ", theirs.contribution_bytes, " bytes");
    }
    peers_.told[r] = theirs.counters.as<unsigned>() + rank();
  }
  auto* counters = memory.counters.as<unsigned>();
  peers_.heard = counters;
  peers_.epoch = counters + cuda::kMaxPeers;
  peers_.arrived = counters + cuda::kMaxPeers + 1;
  peers_.failed = counters + cuda::kMaxPeers + 2;
  peers_.aborted = state_->abort_word.as<unsigned>();
  peers_.fault = memory.fault.as<cuda::ExchangeFault>();
  peers_.timeout_ns = static_cast<unsigned long long>(options().timeout_s * 1e9);
  peers_.max_blocks = options().max_blocks;
  if (peers_.max_blocks == 0) {
    const int multiprocessors = cuda::devices()[static_cast<std::size_t>(device)].multiprocessors;
    peers_.max_blocks = std::clamp(multiprocessors / (2 * on_device), 1, kMostBlocks);
  }
  host_barrier();  // nobody tells a rank whose memory is not open
}

void P2pCommunicator::wait_turn() {
  std::unique_lock lock(state_->mutex);
  state_->changed.wait(lock, [this] { return state_->turn == rank() || state_->is_aborted(); });
  if (state_->is_aborted()) throw CommunicatorAborted{};
}

void P2pCommunicator::pass_turn() {
  {
    std::lock_guard lock(state_->mutex);
    state_->turn = (rank() + 1) % size();
  }
  state_->changed.notify_all();
}

void P2pCommunicator::begin_turn() {
  if (lockstep()) wait_turn();
}

void P2pCommunicator::end_turn() {
  if (!lockstep()) return;
  stream().synchronize();
  pass_turn();
}

void P2pCommunicator::transfer(Collective /*kind*/, const char* name, const Extent& /*extent*/,
                               const Receive& receive) {
  cuda::PeerExchange exchange = peers_;
  exchange.name = name;
  for (int r = 0; r < size(); ++r) {
    const RankMemory& theirs = memory_of(r);
    exchange.parts[r] = theirs.contributions.as<std::byte>() +
                        static_cast<std::size_t>(parity()) * theirs.contribution_bytes;
  }
  if (lockstep()) {
    exchange.waits = false;
    cuda::check_launch(cuda::launch_tell(exchange, stream().get()), name);
    stream().synchronize();
    pass_turn();
    wait_turn();
    exchange.waits = true;
    exchange.tells = false;
  }
  cuda::check_launch(receive(exchange, stream().get()), name);
}

/// The ring is then as it was when a graph was captured.
void P2pCommunicator::make_even() {
  if (parity() == 1) return;
  exchange(Collective::kBarrier, 0, "end of a step", {},
           [](const cuda::PeerExchange& exchange, cuda::Stream stream) {
             cuda::ReduceLaunch nothing;
             nothing.exchange = exchange;
             return cuda::launch_reduce(nothing, stream);
           });
}

void P2pCommunicator::synchronize() {
  stream().synchronize();
  if (!state_->is_aborted()) return;
  const auto& fault = *memory_of(rank()).fault.as<cuda::ExchangeFault>();
  if (fault.exchange == nullptr) throw CommunicatorAborted{};
  fail(ErrorCode::kInternal, "tensor parallelism: rank ", rank(), " waited ", options().timeout_s,
       " s for rank ", fault.missing, " in its exchange ", fault.epoch, ", \"", fault.exchange,
       "\"");
}

class P2pGroup final : public DeviceGroup {
 public:
  P2pGroup(std::vector<int> devices, const ExchangeOptions& options) {
    state_->ranks.resize(devices.size());
    state_->devices = std::move(devices);
    state_->options = options;
  }
  std::unique_ptr<DeviceCommunicator> communicator(std::unique_ptr<Communicator> host) override {
    return std::make_unique<P2pCommunicator>(state_, std::move(host));
  }

 private:
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace

std::unique_ptr<DeviceGroup> make_p2p_group(std::vector<int> devices,
                                            const ExchangeOptions& options) {
  return std::make_unique<P2pGroup>(std::move(devices), options);
}

}  // namespace deinfer

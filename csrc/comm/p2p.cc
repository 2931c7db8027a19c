#include "comm/p2p.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string_view>

#include "base/check.h"
#include "kernels/cuda/devices.h"

namespace deinfer {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr int kMostBlocks = 32;

/// The number in an environment variable, or `otherwise` where there is none.
double number_in(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  const std::string_view all = text;
  double value = 0;
  const auto [end, error] = std::from_chars(all.data(), all.data() + all.size(), value);
  check_argument(error == std::errc{} && end == all.data() + all.size() && value >= 0.0, name, "=",
                 text, " is not a number from 0");
  return value;
}

/// Device memory of a rank: two contributions, then the counters.
struct RankMemory {
  cuda::DeviceBuffer parts;
  cuda::DeviceBuffer counters;  // heard[kMaxPeers], epoch, arrived, failed
  cuda::PinnedBuffer fault;
  std::size_t part_bytes = 0;
};

}  // namespace

P2pOptions P2pOptions::from_environment() {
  P2pOptions options;
  options.lockstep = number_in("DEINFER_CUDA_LOCKSTEP", 0) != 0;
  options.timeout_s = number_in("DEINFER_CUDA_EXCHANGE_TIMEOUT", options.timeout_s);
  options.two_shot_bytes = static_cast<std::size_t>(
      number_in("DEINFER_CUDA_TWO_SHOT", static_cast<double>(options.two_shot_bytes)));
  return options;
}

struct P2pCommunicator::State {
  std::vector<int> devices;
  P2pOptions options;
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

P2pGroup::P2pGroup(std::vector<int> devices, const P2pOptions& options)
    : state_(std::make_shared<P2pCommunicator::State>()) {
  if (devices.size() > cuda::kMaxPeers) {
    fail(ErrorCode::kUnsupported, "tensor_parallel_size=", devices.size(),
         ": on CUDA devices there are at most ", cuda::kMaxPeers, " ranks");
  }
  state_->ranks.resize(devices.size());
  state_->devices = std::move(devices);
  state_->options = options;
}

std::unique_ptr<P2pCommunicator> P2pGroup::communicator(std::unique_ptr<Communicator> host) {
  return std::make_unique<P2pCommunicator>(state_, std::move(host));
}

P2pCommunicator::P2pCommunicator(std::shared_ptr<State> state, std::unique_ptr<Communicator> host)
    : state_(std::move(state)), host_(std::move(host)) {}

P2pCommunicator::~P2pCommunicator() = default;

Ticket P2pCommunicator::start(Collective kind, std::size_t bytes) {
  const Ticket ticket = host_->start(kind, bytes);
  count(kind, bytes);
  return ticket;
}

void P2pCommunicator::abort() {
  {
    std::lock_guard lock(state_->mutex);
    state_->host_aborted.store(true, std::memory_order_release);
  }
  unsigned* word = state_->aborted.load(std::memory_order_acquire);
  if (word != nullptr) std::atomic_ref(*word).store(1, std::memory_order_release);
  state_->changed.notify_all();
  host_->abort();
}

void P2pCommunicator::open(std::size_t bytes, cuda::DeviceStream& stream) {
  stream_ = &stream;
  const auto own = static_cast<std::size_t>(rank());
  const int device = state_->devices[own];
  RankMemory& memory = state_->ranks[own];
  memory.part_bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  memory.parts = cuda::DeviceBuffer(2 * memory.part_bytes);
  memory.counters = cuda::DeviceBuffer((cuda::kMaxPeers + 3) * sizeof(unsigned));
  memory.fault = cuda::PinnedBuffer(sizeof(cuda::ExchangeFault));
  *memory.fault.as<cuda::ExchangeFault>() = {};
  for (auto load :
       {cuda::load_attention_kernels, cuda::load_exchange_kernels, cuda::load_latent_kernels,
        cuda::load_linear_kernels, cuda::load_row_kernels, cuda::load_sampling_kernels}) {
    cuda::check_launch(load(), "loading kernels");
  }
  stream.clear(memory.parts);
  stream.clear(memory.counters);
  stream.synchronize();
  if (own == 0) {
    state_->abort_word = cuda::PinnedBuffer(sizeof(unsigned));
    *state_->abort_word.as<unsigned>() = state_->host_aborted ? 1 : 0;
    state_->aborted.store(state_->abort_word.as<unsigned>(), std::memory_order_release);
  }
  host_->barrier();
  peers_.rank = rank();
  peers_.size = size();
  int on_device = 0;
  for (int r = 0; r < size(); ++r) {
    const RankMemory& theirs = state_->ranks[static_cast<std::size_t>(r)];
    const int other = state_->devices[static_cast<std::size_t>(r)];
    if (other != device) cuda::read_memory_of(other);
    on_device += other == device ? 1 : 0;
    if (theirs.part_bytes != memory.part_bytes) {
      fail(ErrorCode::kInternal, "ranks ", rank(), " and ", r, " exchange ", memory.part_bytes,
           " and ", theirs.part_bytes, " bytes");
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
  peers_.timeout_ns = static_cast<unsigned long long>(state_->options.timeout_s * 1e9);
  peers_.max_blocks = state_->options.max_blocks;
  if (peers_.max_blocks == 0) {
    const int multiprocessors = cuda::devices()[static_cast<std::size_t>(device)].multiprocessors;
    peers_.max_blocks = std::clamp(multiprocessors / (2 * on_device), 1, kMostBlocks);
  }
  host_->barrier();  // nobody tells a rank whose memory is not open
}

bool P2pCommunicator::lockstep() const { return state_->options.lockstep; }

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

void P2pCommunicator::begin_step() {
  if (lockstep()) wait_turn();
}

void P2pCommunicator::end_step() {
  if (!lockstep()) return;
  stream_->synchronize();
  pass_turn();
}

std::byte* P2pCommunicator::send() const {
  const RankMemory& own = state_->ranks[static_cast<std::size_t>(rank())];
  return own.parts.as<std::byte>() + static_cast<std::size_t>(parity_) * own.part_bytes;
}

std::byte* P2pCommunicator::send_after() const {
  const RankMemory& own = state_->ranks[static_cast<std::size_t>(rank())];
  return own.parts.as<std::byte>() + static_cast<std::size_t>(1 - parity_) * own.part_bytes;
}

bool P2pCommunicator::sums_in_two_shots(std::size_t bytes) const {
  return size() > 2 && bytes >= state_->options.two_shot_bytes;
}

cuda::PeerExchange P2pCommunicator::next(const char* name) const {
  cuda::PeerExchange exchange = peers_;
  exchange.name = name;
  for (int r = 0; r < size(); ++r) {
    const RankMemory& theirs = state_->ranks[static_cast<std::size_t>(r)];
    exchange.parts[r] =
        theirs.parts.as<std::byte>() + static_cast<std::size_t>(parity_) * theirs.part_bytes;
  }
  return exchange;
}

void P2pCommunicator::exchange(Collective kind, std::size_t bytes, const char* name,
                               const Receive& receive) {
  const RankMemory& own = state_->ranks[static_cast<std::size_t>(rank())];
  if (bytes > own.part_bytes) {
    fail(ErrorCode::kInternal, "exchange \"", name, "\" of ", bytes, " bytes, there is room for ",
         own.part_bytes);
  }
  if (logs_) {
    log_.emplace_back(kind, bytes);
  } else {
    count(kind, bytes);
  }
  cuda::PeerExchange exchange = next(name);
  if (lockstep()) {
    exchange.waits = false;
    cuda::check_launch(cuda::launch_tell(exchange, stream_->get()), name);
    stream_->synchronize();
    pass_turn();
    wait_turn();
    exchange.waits = true;
    exchange.tells = false;
  }
  cuda::check_launch(receive(exchange, stream_->get()), name);
  parity_ = 1 - parity_;
}

void P2pCommunicator::make_even() {
  if (parity_ == 1) return;
  exchange(Collective::kBarrier, 0, "end of a step",
           [](const cuda::PeerExchange& exchange, cuda::Stream stream) {
             cuda::ReduceLaunch nothing;
             nothing.exchange = exchange;
             return cuda::launch_reduce(nothing, stream);
           });
}

void P2pCommunicator::begin_log() {
  log_.clear();
  logs_ = true;
}

ExchangeLog P2pCommunicator::end_log() {
  logs_ = false;
  return std::exchange(log_, {});
}

void P2pCommunicator::count_all(const ExchangeLog& log) {
  for (const auto& [kind, bytes] : log) count(kind, bytes);
}

void P2pCommunicator::check() const {
  if (!state_->is_aborted()) return;
  const auto& fault =
      *state_->ranks[static_cast<std::size_t>(rank())].fault.as<cuda::ExchangeFault>();
  if (fault.exchange == nullptr) throw CommunicatorAborted{};
  fail(ErrorCode::kInternal, "tensor parallelism: rank ", rank(), " waited ",
       state_->options.timeout_s, " s for rank ", fault.missing, " in its exchange ", fault.epoch,
       ", \"", fault.exchange, "\"");
}

}  // namespace deinfer

#include "comm/nccl.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <future>
#include <string>
#include <thread>

#include "base/check.h"
#include "comm/nccl_library.h"

namespace deinfer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kBlocksPerMultiprocessor = 2;  // of an exchange's kernel
/// Exchanges that the host puts into the stream before it waits: a launch may block when many are
/// before it, and would do so for ever behind an exchange to which a rank does not come.
constexpr int kMostAhead = 32;
constexpr unsigned kPollsBetweenChecks = 64;  // for failures

/// Of all ranks.
struct State {
  std::vector<int> devices;
  ExchangeOptions options;
  nccl::Library nccl;
  nccl::UniqueId id = {};  // by rank 0, before a barrier of all
  std::atomic<bool> aborted{false};
  /// Exchanges that each rank's host has begun; in a graph when it was launched.
  std::array<std::atomic<unsigned>, cuda::kMaxPeers> begun = {};
};

/// Something to send or to receive in one piece.
struct Message {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

/// Messages in place where they are whole rows, else by way of memory where they lie packed.
class Packing {
 public:
  enum class Direction { kPack, kUnpack };
  Packing(Direction direction, bool packs, std::byte* packed)
      : direction_(direction), packs_(packs), packed_(packed) {}

  Message message(std::byte* matrix, const ByteBlock* blocks, int count) {
    if (count == 0) return {};
    if (count == 1 && blocks[0].rows == 1) return {matrix + blocks[0].offset, blocks[0].bytes()};
    if (!packs_) {  // all from the first byte to the last
      const ByteBlock& last = blocks[count - 1];
      const std::size_t end = last.offset + (last.rows - 1) * last.pitch + last.row_bytes;
      return {matrix + blocks[0].offset, end - blocks[0].offset};
    }
    Message message{packed_, 0};
    for (int i = 0; i < count; ++i) {
      add(reinterpret_cast<unsigned*>(matrix + blocks[i].offset), blocks[i]);
      message.bytes += blocks[i].bytes();
    }
    return message;
  }

  void launch(cuda::Stream stream) const {
    if (copies_.count == 0) return;
    cuda::check_launch(cuda::launch_copy_blocks(copies_, stream), "packing for an exchange");
  }

 private:
  void add(unsigned* rows, const ByteBlock& block) {
    cuda::CopyBlock& copy = copies_.blocks[copies_.count++];
    copy.rows = static_cast<int>(block.rows);
    copy.row_words = static_cast<int>(block.row_bytes / sizeof(unsigned));
    const auto pitch = static_cast<std::int64_t>(block.pitch / sizeof(unsigned));
    auto* packed = reinterpret_cast<unsigned*>(packed_);
    const bool packs = direction_ == Direction::kPack;
    copy.from = packs ? rows : packed;
    copy.from_pitch = packs ? pitch : copy.row_words;
    copy.to = packs ? packed : rows;
    copy.to_pitch = packs ? copy.row_words : pitch;
    packed_ += block.bytes();
  }

  Direction direction_;
  bool packs_;
  std::byte* packed_;  // what is free of it
  cuda::CopyBlocksLaunch copies_;
};

class NcclCommunicator final : public DeviceCommunicator {
 public:
  NcclCommunicator(std::shared_ptr<State> state, std::unique_ptr<Communicator> host)
      : DeviceCommunicator(std::move(host), state->options), state_(std::move(state)) {}
  ~NcclCommunicator() override;

  void abort() override;
  void open(std::size_t bytes, cuda::DeviceStream& stream) override;
  void synchronize() override;

 private:
  void transfer(Collective kind, const char* name, const Extent& extent,
                const Receive& receive) override;
  void begin_exchanges(std::size_t count) override;
  /// Brings what this rank reads into staging_, and sends what the others do.
  void move(Collective kind, const Extent& extent);
  bool packs(Collective kind, const Extent& extent) const;
  int blocks_between(int writer, int reader, Collective kind, const Extent& extent,
                     ByteBlock (&out)[Extent::kMaxColumns]) const;
  void check(int result, const char* call);
  [[noreturn]] void time_out(unsigned exchange);
  void stop();

  std::byte* staged(int rank) const {
    return staging_.as<std::byte>() + static_cast<std::size_t>(rank) * contribution_bytes();
  }
  /// Where this rank packs what it sends: no part of its own is staged.
  std::byte* packed() const { return staged(rank()); }
  std::atomic_ref<unsigned> exchanges_done() const {
    return std::atomic_ref(*progress_.as<unsigned>());
  }

  std::shared_ptr<State> state_;
  cuda::DeviceBuffer contributions_;  // two
  cuda::DeviceBuffer staging_;        // one of each rank
  cuda::DeviceBuffer counters_;       // epoch, arrived
  cuda::PinnedBuffer progress_;       // exchanges that the device has done
  cuda::PeerExchange peers_;          // but for `parts`
  nccl::Comm comm_ = nullptr;
  int ahead_ = 0;  // exchanges in the stream since the host waited
  std::future<void> stopping_;
};

/// Graphs that have NCCL's work must be gone by now: NCCL waits for them.
NcclCommunicator::~NcclCommunicator() {
  if (comm_ == nullptr) return;
  if (!state_->aborted.load(std::memory_order_acquire)) {
    state_->nccl.comm_destroy(comm_);
    return;
  }
  stop();
  stopping_.wait_for(std::chrono::duration<double>(options().timeout_s));
}

void NcclCommunicator::abort() {
  state_->aborted.store(true, std::memory_order_release);
  abort_host();
}

/// Ends this rank's work on the device. ncclCommAbort() does so at once, but returns only when
/// graphs that have NCCL's work are gone, so that it needs a thread of its own.
void NcclCommunicator::stop() {
  if (stopping_.valid()) return;
  std::packaged_task<void()> task([abort = state_->nccl.comm_abort, comm = comm_] { abort(comm); });
  stopping_ = task.get_future();
  std::thread(std::move(task)).detach();
}

/// A call that fails after another rank has failed is not the reason.
void NcclCommunicator::check(int result, const char* call) {
  if (result == nccl::kSuccess) return;
  if (state_->aborted.load(std::memory_order_acquire)) throw CommunicatorAborted{};
  state_->nccl.check(result, call);
}

void NcclCommunicator::open(std::size_t bytes, cuda::DeviceStream& own_stream) {
  const std::size_t part = aligned(bytes);
  contributions_ = cuda::DeviceBuffer(2 * part);
  staging_ = cuda::DeviceBuffer(static_cast<std::size_t>(size()) * part);
  counters_ = cuda::DeviceBuffer(2 * sizeof(unsigned));
  progress_ = cuda::PinnedBuffer(sizeof(unsigned));
  *progress_.as<unsigned>() = 0;
  use(own_stream, contributions_.as<std::byte>(), part);
  stream().clear(contributions_);
  stream().clear(staging_);
  stream().clear(counters_);
  stream().synchronize();
  peers_.rank = rank();
  peers_.size = size();
  peers_.epoch = counters_.as<unsigned>();
  peers_.arrived = counters_.as<unsigned>() + 1;
  peers_.progress = progress_.as<unsigned>();
  peers_.tells = peers_.waits = false;
  const int device = state_->devices[static_cast<std::size_t>(rank())];
  peers_.max_blocks = options().max_blocks != 0
                          ? options().max_blocks
                          : kBlocksPerMultiprocessor * cuda::multiprocessors(device);
  if (rank() == 0) check(state_->nccl.get_unique_id(&state_->id), "ncclGetUniqueId");
  host_barrier();  // nobody waits in NCCL for a rank that has failed before
  check(state_->nccl.comm_init_rank(&comm_, size(), state_->id, rank()), "ncclCommInitRank");
  // The first send and receive connect two ranks, which may wait and cannot be captured.
  move(Collective::kAllGather, Extent::floats(1, 1));
  synchronize();
  host_barrier();
}

void NcclCommunicator::begin_exchanges(std::size_t count) {
  state_->begun[static_cast<std::size_t>(rank())] += static_cast<unsigned>(count);
}

int NcclCommunicator::blocks_between(int writer, int reader, Collective kind, const Extent& extent,
                                     ByteBlock (&out)[Extent::kMaxColumns]) const {
  if (writer == reader || (kind == Collective::kGather && reader != 0)) return 0;
  return extent.blocks(writer, reader, out);
}

/// Whether columns are packed, as they do unless tiles that several ranks touch make them more than
/// a whole contribution. Every rank says the same of all.
bool NcclCommunicator::packs(Collective kind, const Extent& extent) const {
  ByteBlock blocks[Extent::kMaxColumns];
  for (int r = 0; r < size(); ++r) {
    std::size_t sent = 0;
    std::size_t received = 0;
    for (int other = 0; other < size(); ++other) {
      for (int i = blocks_between(r, other, kind, extent, blocks); i > 0; --i) {
        sent += blocks[i - 1].bytes();
      }
      for (int i = blocks_between(other, r, kind, extent, blocks); i > 0; --i) {
        received += blocks[i - 1].bytes();
      }
    }
    if (std::max(sent, received) > contribution_bytes()) return false;
  }
  return true;
}

void NcclCommunicator::move(Collective kind, const Extent& extent) {
  const bool packs_columns = extent.num_columns > 0 && packs(kind, extent);
  // What comes is packed in the next contribution's place: see send_after().
  Packing out(Packing::Direction::kPack, packs_columns, packed());
  Packing in(Packing::Direction::kUnpack, packs_columns, send_after());
  std::array<Message, cuda::kMaxPeers> sent = {};
  std::array<Message, cuda::kMaxPeers> received = {};
  bool any = false;
  ByteBlock blocks[Extent::kMaxColumns];
  const Message* same = nullptr;  // what a writer owns goes to all others
  for (int r = 0; r < size(); ++r) {
    const auto index = static_cast<std::size_t>(r);
    int count = blocks_between(rank(), r, kind, extent, blocks);
    if (count > 0 && !extent.of_reader && same != nullptr) {
      sent[index] = *same;
    } else if (count > 0) {
      sent[index] = out.message(send(), blocks, count);
      same = &sent[index];
    }
    count = blocks_between(r, rank(), kind, extent, blocks);
    received[index] = in.message(staged(r), blocks, count);
    any |= sent[index].bytes > 0 || received[index].bytes > 0;
  }
  if (!any) return;
  out.launch(stream().get());
  const nccl::Library& nccl = state_->nccl;
  void* queue = stream().get();
  check(nccl.group_start(), "ncclGroupStart");
  int result = nccl::kSuccess;
  const char* call = "";
  for (int i = 1; i < size() && result == nccl::kSuccess; ++i) {
    // Each with another one at a time.
    const int to = (rank() + i) % size();
    const int from = (rank() + size() - i) % size();
    const Message& leaves = sent[static_cast<std::size_t>(to)];
    const Message& comes = received[static_cast<std::size_t>(from)];
    if (leaves.bytes > 0) {
      call = "ncclSend";
      result = nccl.send(leaves.data, leaves.bytes, nccl::kInt8, to, comm_, queue);
    }
    if (comes.bytes > 0 && result == nccl::kSuccess) {
      call = "ncclRecv";
      result = nccl.receive(comes.data, comes.bytes, nccl::kInt8, from, comm_, queue);
    }
  }
  const int ended = nccl.group_end();  // groups are the thread's, which may have another engine
  check(result, call);
  check(ended, "ncclGroupEnd");
  in.launch(stream().get());
}

void NcclCommunicator::transfer(Collective kind, const char* name, const Extent& extent,
                                const Receive& receive) {
  if (!logs() && ++ahead_ > kMostAhead) synchronize();
  move(kind, extent);
  cuda::PeerExchange exchange = peers_;
  exchange.name = name;
  for (int r = 0; r < size(); ++r) exchange.parts[r] = r == rank() ? send() : staged(r);
  cuda::check_launch(receive(exchange, stream().get()), name);
}

void NcclCommunicator::time_out(unsigned exchange) {
  int missing = -1;
  for (int r = 0; r < size(); ++r) {
    const unsigned begun = state_->begun[static_cast<std::size_t>(r)];
    if (static_cast<int>(begun - exchange) < 0) missing = r;
  }
  abort();
  fail(ErrorCode::kInternal, "tensor parallelism: rank ", rank(), " waited ", options().timeout_s,
       " s for ", missing >= 0 ? str_cat("rank ", missing) : std::string("NCCL"),
       " in its exchange ", exchange);
}

/// Polls, as a stream behind an exchange to which a rank does not come never ends.
void NcclCommunicator::synchronize() {
  const auto most = std::chrono::duration<double>(options().timeout_s);
  unsigned done = exchanges_done();
  Clock::time_point since = Clock::now();  // of the last progress
  for (unsigned polls = 1; !stream().is_done(); ++polls) {
    std::this_thread::yield();
    if (polls % kPollsBetweenChecks != 0) continue;
    if (state_->aborted.load(std::memory_order_acquire)) {
      stop();
      if (Clock::now() - since > most) break;  // NCCL does not end either
      continue;
    }
    int error = nccl::kSuccess;
    check(state_->nccl.comm_get_async_error(comm_, &error), "ncclCommGetAsyncError");
    if (error != nccl::kInProgress) check(error, "an exchange");
    if (const unsigned now_done = exchanges_done(); now_done != done) {
      done = now_done;
      since = Clock::now();
    } else if (Clock::now() - since > most) {
      time_out(done + 1);
    }
  }
  ahead_ = 0;
  if (state_->aborted.load(std::memory_order_acquire)) throw CommunicatorAborted{};
}

class NcclGroup final : public DeviceGroup {
 public:
  NcclGroup(std::vector<int> devices, const ExchangeOptions& options) {
    check_argument(!options.lockstep,
                   "DEINFER_CUDA_LOCKSTEP=1: ranks that exchange by NCCL run at the same time");
    for (std::size_t i = 0; i < devices.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (devices[i] != devices[j]) continue;
        fail(ErrorCode::kUnsupported, "tensor parallelism: ranks ", j, " and ", i,
             " share CUDA device ", devices[i],
             ", and NCCL wants a device for each rank; all ranks on one device (\"cuda:N\") do "
             "without NCCL unless DEINFER_CUDA_TRANSPORT asks for it");
      }
    }
    state_->nccl = nccl::load();
    state_->devices = std::move(devices);
    state_->options = options;
  }
  std::unique_ptr<DeviceCommunicator> communicator(std::unique_ptr<Communicator> host) override {
    return std::make_unique<NcclCommunicator>(state_, std::move(host));
  }

 private:
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace

std::unique_ptr<DeviceGroup> make_nccl_group(std::vector<int> devices,
                                             const ExchangeOptions& options) {
  return std::make_unique<NcclGroup>(std::move(devices), options);
}

}  // namespace deinfer

// Ranks on CUDA devices of one process: how they exchange what kernels have computed.
//
// Each rank is a thread with a stream. Kernels of that stream write what the rank contributes into
// send(); exchange() then puts one kernel behind them (kernels/cuda/exchange.h) that reads what all
// have contributed, in rank order: so results have the same bits whatever the way there. The host
// waits for nothing, and graphs have exchanges like any other launch.
//
// There are two ways: kernels read the other ranks' memory where it is (p2p.cc), or NCCL brings
// what they read into the memory of their own device (nccl.cc).
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "comm/extent.h"
#include "kernels/cuda/runtime.h"

namespace deinfer {

enum class ExchangeTransport {
  kAuto,  // p2p where every device can read the memory of all others, else nccl
  kP2p,
  kNccl,
};

struct ExchangeOptions {
  ExchangeTransport transport = ExchangeTransport::kAuto;
  /// Ranks run one after another between exchanges, and no kernel waits: for debugging, with the
  /// same bits. Of p2p alone.
  bool lockstep = false;
  double timeout_s = 30.0;  // of waiting for a rank
  /// Sums of contributions from so many bytes on are made by one rank for each row, for all.
  std::size_t two_shot_bytes = std::size_t{512} << 10;
  int max_blocks = 0;  // of an exchange's kernel; 0: what suits the device

  /// The defaults, or what DEINFER_CUDA_TRANSPORT ("auto", "p2p", "nccl"), DEINFER_CUDA_LOCKSTEP
  /// (1), DEINFER_CUDA_EXCHANGE_TIMEOUT (seconds) and DEINFER_CUDA_TWO_SHOT (bytes) say. Throws
  /// kInvalidArgument naming a value that is none of these.
  static ExchangeOptions from_environment();
};

/// What a graph exchanges.
using ExchangeLog = std::vector<std::pair<Collective, std::size_t>>;

/// One rank's end. As Communicator it is `host`, one of threads of this process, for what is
/// exchanged while loading; both count as its traffic.
class DeviceCommunicator : public Communicator {
 public:
  // Of the host.
  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::size_t max_bytes() const override { return host_->max_bytes(); }
  std::byte* contribution(std::size_t bytes) override { return host_->contribution(bytes); }
  Ticket next_ticket() const override { return host_->next_ticket(); }
  Ticket start(Collective kind, std::size_t bytes) override;
  void wait(Ticket ticket) override { host_->wait(ticket); }
  const std::byte* contribution_of(int rank, Ticket ticket) const override {
    return host_->contribution_of(rank, ticket);
  }
  void finish(Ticket ticket) override { host_->finish(ticket); }
  /// Frees the ranks that wait for each other's devices too, now and later.
  void abort() override = 0;

  // Of the devices, by the rank's thread.

  /// Loads all kernels and allocates this rank's memory on its device, for contributions of at most
  /// `bytes`. Collective, once; `stream` is this rank's from then on. Throws kUnsupported where the
  /// devices cannot exchange in this way, and kOutOfMemory.
  virtual void open(std::size_t bytes, cuda::DeviceStream& stream) = 0;

  bool is_open() const { return stream_ != nullptr; }

  /// Around what a rank launches or waits for: in lockstep they wait for its turn, and hand it on.
  virtual void begin_turn() {}
  virtual void end_turn() {}
  virtual bool lockstep() const { return false; }

  /// Device memory for what this rank contributes to its next exchange, 256-byte aligned, and to
  /// the one after it: what the kernel of the next may write where its Extent has no columns.
  std::byte* send() const { return contribution_at(parity_); }
  std::byte* send_after() const { return contribution_at(1 - parity_); }
  bool sums_in_two_shots(std::size_t bytes) const;
  /// Makes the next exchange, `bytes` of it from this rank; `extent` is the same on all ranks, and
  /// of a kGather only rank 0 reads. `receive` launches the kernel that does what it is given.
  /// `name` stands in errors and must live on.
  using Receive = std::function<int(const cuda::PeerExchange&, cuda::Stream)>;
  void exchange(Collective kind, std::size_t bytes, const char* name, const Extent& extent,
                const Receive& receive);
  /// To end whatever is repeated: graphs then find their contributions where they were when they
  /// were captured.
  virtual void make_even() {}

  /// From here on exchanges are written down and not counted, as they are captured and not made.
  void begin_log();
  ExchangeLog end_log();
  void count_all(const ExchangeLog& log);

  /// Waits for the stream. Throws kInternal naming the rank that did not come to an exchange, and
  /// CommunicatorAborted when another rank has failed.
  virtual void synchronize() = 0;

 protected:
  DeviceCommunicator(std::unique_ptr<Communicator> host, const ExchangeOptions& options);

  /// What open() has to do in any case. `contributions`: two, `contribution_bytes` each.
  void use(cuda::DeviceStream& stream, std::byte* contributions, std::size_t contribution_bytes);
  /// Puts an exchange into the stream.
  virtual void transfer(Collective kind, const char* name, const Extent& extent,
                        const Receive& receive) = 0;
  /// So many exchanges are made next.
  virtual void begin_exchanges(std::size_t /*count*/) {}

  std::byte* contribution_at(int parity) const {
    return contributions_ + static_cast<std::size_t>(parity) * contribution_bytes_;
  }
  static std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
  const ExchangeOptions& options() const { return options_; }
  cuda::DeviceStream& stream() const { return *stream_; }
  std::size_t contribution_bytes() const { return contribution_bytes_; }
  int parity() const { return parity_; }
  bool logs() const { return logs_; }
  void host_barrier() { host_->barrier(); }
  void abort_host() { host_->abort(); }

 private:
  std::unique_ptr<Communicator> host_;
  ExchangeOptions options_;
  cuda::DeviceStream* stream_ = nullptr;
  std::byte* contributions_ = nullptr;
  std::size_t contribution_bytes_ = 0;
  int parity_ = 1;  // of the next exchange
  bool logs_ = false;
  ExchangeLog log_;
};

class DeviceGroup {
 public:
  virtual ~DeviceGroup() = default;
  virtual std::unique_ptr<DeviceCommunicator> communicator(std::unique_ptr<Communicator> host) = 0;
};

/// `devices`: of each rank. Throws kUnsupported for more ranks than kMaxPeers, and for what NCCL
/// cannot do where it is the way.
std::unique_ptr<DeviceGroup> make_device_group(std::vector<int> devices,
                                               const ExchangeOptions& options);

}  // namespace deinfer

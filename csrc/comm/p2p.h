// Ranks on CUDA devices of one process: they read each other's device memory, by plain pointers on
// one device and by peer access between several.
//
// Each rank is a thread with a stream. Kernels of that stream write what the rank contributes into
// send(); exchange() then puts one kernel behind them (kernels/cuda/exchange.h), which tells the
// other ranks, waits for them on the device and reads their contributions. So the host waits for
// nothing, and graphs have exchanges like any other launch.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "comm/communicator.h"
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/runtime.h"

namespace deinfer {

struct P2pOptions {
  /// Ranks run one after another between exchanges, and no kernel waits: for debugging, with the
  /// same bits.
  bool lockstep = false;
  double timeout_s = 30.0;  // of waiting for a rank
  /// Sums of contributions from so many bytes on are made by one rank for each row, for all.
  std::size_t two_shot_bytes = std::size_t{512} << 10;
  int max_blocks = 0;  // of a kernel that waits; 0: what leaves room on the device

  /// The defaults, or what DEINFER_CUDA_LOCKSTEP (1), DEINFER_CUDA_EXCHANGE_TIMEOUT (seconds) and
  /// DEINFER_CUDA_TWO_SHOT (bytes) say. Throws kInvalidArgument naming a value that is no number.
  static P2pOptions from_environment();
};

/// What a graph exchanges.
using ExchangeLog = std::vector<std::pair<Collective, std::size_t>>;

/// One rank's end. As Communicator it is `host`, one of threads of this process, for what is
/// exchanged while loading; both count as its traffic.
class P2pCommunicator final : public Communicator {
 public:
  struct State;
  P2pCommunicator(std::shared_ptr<State> state, std::unique_ptr<Communicator> host);
  ~P2pCommunicator() override;

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
  /// Frees the ranks' kernels too, now and later.
  void abort() override;

  // Of the devices, by the rank's thread.

  /// Loads all kernels, allocates this rank's memory on its device, for contributions of at most
  /// `bytes`, and finds that of the others. Collective, once; `stream` is this rank's from then on.
  /// Throws kUnsupported where a device cannot read another's memory, and kOutOfMemory.
  void open(std::size_t bytes, cuda::DeviceStream& stream);

  /// In lockstep waits for this rank's turn, and hands it on.
  void begin_step();
  void end_step();
  bool lockstep() const;

  /// Device memory for what this rank contributes to its next exchange, 256-byte aligned, and to
  /// the one after it: what the kernel of the next may write.
  std::byte* send() const;
  std::byte* send_after() const;
  bool sums_in_two_shots(std::size_t bytes) const;
  /// Makes the next exchange, `bytes` of it from this rank. `receive` launches the kernel that does
  /// what it is given. `name` stands in errors and must live on.
  using Receive = std::function<int(const cuda::PeerExchange&, cuda::Stream)>;
  void exchange(Collective kind, std::size_t bytes, const char* name, const Receive& receive);
  /// Makes the number of exchanges so far even, so that graphs find their contributions where they
  /// were when they were captured. To end whatever is repeated.
  void make_even();

  /// From here on exchanges are written down and not counted, as they are captured and not made.
  void begin_log();
  ExchangeLog end_log();
  void count_all(const ExchangeLog& log);

  /// To be called after the stream was synchronised: throws kInternal naming the rank that did not
  /// come to an exchange, and CommunicatorAborted when another rank has failed.
  void check() const;

 private:
  cuda::PeerExchange next(const char* name) const;
  void wait_turn();
  void pass_turn();

  std::shared_ptr<State> state_;
  std::unique_ptr<Communicator> host_;
  cuda::DeviceStream* stream_ = nullptr;
  cuda::PeerExchange peers_;  // but for `parts`
  int parity_ = 1;            // of the next exchange
  bool logs_ = false;
  ExchangeLog log_;
};

/// `devices`: of each rank.
class P2pGroup {
 public:
  /// Throws kUnsupported for more ranks than kMaxPeers.
  P2pGroup(std::vector<int> devices, const P2pOptions& options);
  std::unique_ptr<P2pCommunicator> communicator(std::unique_ptr<Communicator> host);

 private:
  std::shared_ptr<P2pCommunicator::State> state_;
};

}  // namespace deinfer

// Ranks on a device as threads, for tests of what they exchange.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "base/check.h"
#include "comm/device_communicator.h"
#include "comm/local.h"
#include "cuda_fixture.h"
#include "nccl_devices.h"

namespace deinfer::test {

/// One rank: a thread with a stream.
struct Rank {
  int rank;
  int size;
  DeviceCommunicator& comm;
  cuda::DeviceStream& stream;

  template <typename T>
  std::vector<T> read(const void* data, std::size_t count) const {
    std::vector<T> values(count);
    stream.download(values.data(), data, count * sizeof(T));
    comm.synchronize();
    return values;
  }
  template <typename T>
  void send(const std::vector<T>& values) const {
    stream.upload(comm.send(), values.data(), values.size() * sizeof(T));
    if (!comm.lockstep()) return;  // `values` must live until the stream has taken them
    stream.synchronize();
  }
  /// x = the sum of all ranks' x, fp32, `count` times, each of what the one before gave: a stale or
  /// torn contribution would show.
  void sum(int count, const cuda::DeviceBuffer& x) const {
    const int n = static_cast<int>(x.size() / sizeof(float));
    for (int i = 0; i < count; ++i) {
      cuda::NormLaunch copy;  // contributes x
      copy.x = x.as<float>();
      copy.ld = copy.out_ld = copy.n = n;
      copy.m = 1;
      copy.out_float = reinterpret_cast<float*>(comm.send());
      cuda::check_launch(launch_norm(copy, stream.get()), "copy");
      comm.exchange(Collective::kAllReduce, x.size(), "sum", Extent::floats(1, n),
                    [&](const cuda::PeerExchange& exchange, cuda::Stream on) {
                      cuda::ReduceLaunch args;
                      args.exchange = exchange;
                      args.rows = 1;
                      args.cols = args.ld = args.out_ld = n;
                      args.out = x.as<void>();
                      return launch_reduce(args, on);
                    });
    }
  }
};

class CudaExchangeTest : public CudaDeviceTest {
 protected:
  static constexpr std::size_t kBytes = 64 << 10;

  /// f(rank) on a thread each; what one throws is thrown. `devices`: of each, or all on the first.
  static void on_ranks(int size, const ExchangeOptions& options,
                       const std::function<void(const Rank&)>& f, std::vector<int> devices = {}) {
    LocalGroup local(size, 1024);
    devices.resize(static_cast<std::size_t>(size));
    const auto group = make_device_group(devices, options);
    std::vector<std::unique_ptr<DeviceCommunicator>> ends;
    for (int rank = 0; rank < size; ++rank) {
      ends.push_back(group->communicator(local.communicator(rank)));
    }
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        const auto index = static_cast<std::size_t>(rank);
        try {
          cuda::use_device(devices[index]);
          cuda::DeviceStream stream;
          ends[index]->open(kBytes, stream);
          ends[index]->begin_turn();
          f({rank, size, *ends[index], stream});
          ends[index]->end_turn();
          ends[index]->synchronize();
        } catch (const CommunicatorAborted&) {
        } catch (...) {
          errors[index] = std::current_exception();
          ends[index]->abort();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  }

  /// f under everything that must not change a result, for 1 to 8 ranks.
  static void in_every_way(const std::function<void(const Rank&)>& f) {
    for (int size : {1, 2, 3, 4, 8}) {
      for (int order = 0; order < std::min(kThreadOrders, 3); ++order) {
        set_thread_order(order);
        ExchangeOptions options;
        options.max_blocks = 1 + order;
        options.transport = ExchangeTransport::kP2p;
        for (bool lockstep : {false, true}) {
          SCOPED_TRACE(str_cat(size, " ranks, lockstep ", lockstep, ", order ", order));
          options.lockstep = lockstep;
          on_ranks(size, options, f);
        }
        const std::vector<int> devices = nccl_devices(size);
        if (devices.empty()) continue;
        SCOPED_TRACE(str_cat(size, " ranks by NCCL, order ", order));
        options.lockstep = false;
        options.transport = ExchangeTransport::kNccl;
        on_ranks(size, options, f, devices);
      }
    }
  }
};

}  // namespace deinfer::test

// The protocol of exchanges between ranks on devices: over many epochs and in graphs, and how a
// rank that does not come ends them.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <string>

#include "cuda_exchange_fixture.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using test::Rank;

class CudaExchangeProtocol : public test::CudaExchangeTest {};

TEST_F(CudaExchangeProtocol, KeepsManyEpochsApart) {
  for (int size : {2, 8}) {
    ExchangeOptions options;
    options.max_blocks = 2;
    on_ranks(size, options, [](const Rank& rank) {
      constexpr int n = 2052;
      DeviceBuffer x(n * sizeof(float));
      const std::vector<float> ones(n, 1.0f);
      for (int round = 0; round < test::kExchanges / 5; ++round) {
        rank.stream.upload(x.as<void>(), ones.data(), x.size());
        if (rank.rank == round % rank.size) {
          std::this_thread::sleep_for(std::chrono::microseconds(50 * (round % 5)));
        }
        rank.sum(5, x);
        const std::vector<float> expected(n, static_cast<float>(std::pow(rank.size, 5)));
        ASSERT_EQ(rank.read<float>(x.as<void>(), n), expected) << "round " << round;
      }
    });
  }
}

TEST_F(CudaExchangeProtocol, RunsInGraphs) {
  on_ranks(3, {}, [](const Rank& rank) {
    constexpr int n = 36;
    DeviceBuffer x(n * sizeof(float));
    const std::vector<float> ones(n, 1.0f);
    rank.sum(1, x);  // kernels load at their first launch
    rank.comm.make_even();
    rank.stream.synchronize();
    rank.comm.begin_log();
    rank.stream.begin_capture();
    rank.sum(3, x);
    rank.comm.make_even();
    const cuda::Graph graph = rank.stream.end_capture();
    const ExchangeLog log = rank.comm.end_log();
    EXPECT_EQ(log.size(), 4u);
    const std::uint64_t calls =
        rank.comm.traffic()[static_cast<std::size_t>(Collective::kAllReduce)].calls;
    for (int round = 0; round < 20; ++round) {
      rank.stream.upload(x.as<void>(), ones.data(), x.size());
      rank.stream.launch(graph);
      rank.comm.count_all(log);
      ASSERT_EQ(rank.read<float>(x.as<void>(), n), std::vector<float>(n, 27.0f)) << round;
    }
    EXPECT_EQ(rank.comm.traffic()[static_cast<std::size_t>(Collective::kAllReduce)].calls,
              calls + 60);
  });
}

TEST_F(CudaExchangeProtocol, ARankThatDoesNotComeIsAnErrorThatNamesIt) {
  ExchangeOptions options;
  options.timeout_s = 1.5;
  const auto start = std::chrono::steady_clock::now();
  try {
    on_ranks(3, options, [](const Rank& rank) {
      DeviceBuffer x(64 * sizeof(float));
      rank.sum(2, x);
      rank.comm.synchronize();
      if (rank.rank == 1) return;
      rank.sum(50, x);  // which all end at once after the first
      rank.comm.synchronize();
      ADD_FAILURE() << "no error";
    });
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("waited 1.5 s for rank 1 in its exchange 3, \"sum\""),
              std::string::npos)
        << error.what();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST_F(CudaExchangeProtocol, AnAbortFreesThoseWhoWait) {
  for (bool lockstep : {false, true}) {
    ExchangeOptions options;
    options.lockstep = lockstep;
    try {
      on_ranks(3, options, [](const Rank& rank) {
        DeviceBuffer x(64 * sizeof(float));
        if (rank.rank == 2) fail(ErrorCode::kUnsupported, "rank 2 has enough");
        rank.sum(2, x);
        rank.comm.synchronize();
        ADD_FAILURE() << "no error";
      });
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_STREQ(error.what(), "rank 2 has enough");
    }
  }
}

TEST_F(CudaExchangeProtocol, RefusesTooManyRanks) {
  EXPECT_THROW(make_device_group(std::vector<int>(9, 0), {}), Error);
}

}  // namespace
}  // namespace deinfer

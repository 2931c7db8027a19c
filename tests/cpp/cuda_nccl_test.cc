// Exchanges by NCCL: what travels, what is refused, and how a rank that fails or does not come ends
// them. NCCL is a fake here (cuda_emulation/fake_nccl.cc). That results are those of p2p:
// cuda_exchange_test.cc, cuda_nccl_ranks_test.cc.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "comm/nccl_library.h"
#include "cuda_exchange_fixture.h"
#include "expect_error.h"
#include "setting.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using test::expect_error;
using test::Rank;
using test::Setting;

class CudaNccl : public test::CudaExchangeTest {
 protected:
  void SetUp() override {
    test::CudaExchangeTest::SetUp();
    options_.transport = ExchangeTransport::kNccl;
    options_.timeout_s = 20.0;
  }
  void TearDown() override {
    fake_.version = emulation::FakeNccl{}.version.load();
    fake_.init_result = fake_.send_result = fake_.async_error = 0;
    emulation::device_state().count = 1;
    emulation::device_state().reads_peers = true;
    test::CudaExchangeTest::TearDown();
  }
  void on_nccl(int size, const std::function<void(const Rank&)>& f) {
    on_ranks(size, options_, f, test::nccl_devices(size));
  }

  ExchangeOptions options_;
  emulation::FakeNccl& fake_ = test::use_fake_nccl();
};

DeviceBuffer ones(const Rank& rank, int n) {
  DeviceBuffer x(static_cast<std::size_t>(n) * sizeof(float));
  const std::vector<float> values(static_cast<std::size_t>(n), 1.0f);
  rank.stream.upload(x.as<void>(), values.data(), x.size());
  rank.stream.synchronize();
  return x;
}

TEST_F(CudaNccl, SumsInGraphsAndWithout) {
  for (int size : {2, 4}) {
    on_nccl(size, [](const Rank& rank) {
      constexpr int n = 36;
      DeviceBuffer x = ones(rank, n);
      rank.sum(40, x);  // more than the host may be ahead
      x = ones(rank, n);
      rank.sum(3, x);
      const std::vector<float> expected(n, static_cast<float>(std::pow(rank.size, 3)));
      EXPECT_EQ(rank.read<float>(x.as<void>(), n), expected);
      rank.comm.begin_log();
      rank.stream.begin_capture();
      rank.sum(3, x);
      const cuda::Graph graph = rank.stream.end_capture();
      const ExchangeLog log = rank.comm.end_log();
      EXPECT_EQ(log.size(), 3u);
      for (int round = 0; round < 5; ++round) {
        const std::vector<float> values(n, 1.0f);
        rank.stream.upload(x.as<void>(), values.data(), x.size());
        rank.comm.count_all(log);
        rank.stream.launch(graph);
        ASSERT_EQ(rank.read<float>(x.as<void>(), n), expected) << round;
      }
      const Traffic& traffic = rank.comm.traffic();
      EXPECT_EQ(traffic[static_cast<std::size_t>(Collective::kAllReduce)].calls, 40u + 3 + 5 * 3);
    });
    EXPECT_EQ(fake_.comms, 0) << "destroyed";
  }
}

/// Each rank sums what it owns of rows, or of columns, some nothing: only that travels.
TEST_F(CudaNccl, MovesWhatRanksRead) {
  constexpr int kRows = 5, kCols = 12;
  for (int size : {2, 3, 4}) {
    for (bool by_rows : {true, false}) {
      SCOPED_TRACE(str_cat(size, " ranks by ", by_rows ? "rows" : "columns"));
      const int whole = by_rows ? kRows : kCols;
      cuda::Borders owners;  // the first rank has nothing
      for (int r = 0; r <= size; ++r) {
        owners.at[r] = r == 0 ? 0 : whole * (r - 1) / (size - 1) / 4 * 4;
      }
      owners.at[size] = whole;
      std::uint64_t before = 0;
      on_nccl(size, [&](const Rank& rank) {
        if (rank.rank == 0) before = fake_.bytes;
        rank.comm.barrier();
        std::vector<float> mine(kRows * kCols);
        for (std::size_t i = 0; i < mine.size(); ++i) {
          mine[i] = static_cast<float>((rank.rank + 1) * static_cast<int>(i));
        }
        rank.send(mine);
        DeviceBuffer out(mine.size() * sizeof(float));
        rank.stream.clear(out);
        Extent extent = Extent::floats(kRows, kCols);
        extent.of_reader = true;
        by_rows ? extent.divide_rows(owners) : extent.divide_columns(owners);
        const int begin = owners.at[rank.rank];
        const int count = owners.at[rank.rank + 1] - begin;
        rank.comm.exchange(Collective::kReduceScatter, mine.size() * sizeof(float), "scatter",
                           extent, [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                             cuda::ReduceLaunch args;
                             args.exchange = exchange;
                             args.first_row = by_rows ? begin : 0;
                             args.rows = by_rows ? count : kRows;
                             args.first_col = by_rows ? 0 : begin;
                             args.cols = by_rows ? kCols : count;
                             args.ld = kCols;
                             args.out = out.as<void>();
                             args.out_ld = kCols;
                             return launch_reduce(args, stream);
                           });
        const std::vector<float> got = rank.read<float>(out.as<void>(), kRows * kCols);
        const int factor = rank.size * (rank.size + 1) / 2;
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < kCols; ++j) {
            const int index = by_rows ? i : j;
            if (index < begin || index >= begin + count) continue;
            // Rows that a kernel takes begin at args.first_row in its output, columns at 0.
            const int at = by_rows ? i * kCols + j : i * kCols + j - begin;
            EXPECT_EQ(got[static_cast<std::size_t>(at)],
                      static_cast<float>(factor * (i * kCols + j)));
          }
        }
      });
      EXPECT_EQ(fake_.bytes - before, sizeof(float) * kRows * kCols * (size - 1));
    }
  }
}

/// As tiles may be that all ranks touch.
TEST_F(CudaNccl, ColumnsThatAreTooManyToPackTravelWithWhatIsBetween) {
  constexpr int kRows = 16, kChunks = 64;  // all that there is room for
  on_nccl(3, [](const Rank& rank) {
    auto value = [](int owner, int row, int col) {
      return to_bf16(static_cast<float>(owner * 64 + (row * 7 + col) % 61));
    };
    cuda::GatherActivationsLaunch args;
    args.rows = kRows;
    args.chunks = args.out_chunks = kChunks;
    args.columns[0].padded = kChunks * cuda::kTileCols;
    args.num_columns = 1;
    for (int r = 0; r <= 3; ++r) args.columns[0].owners.at[r] = r * kChunks * cuda::kTileCols / 3;
    constexpr std::size_t kCount = std::size_t{kRows} * kChunks * cuda::kTileCols;
    std::vector<bf16> mine(kCount);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kChunks * cuda::kTileCols; ++j) {
        mine[static_cast<std::size_t>(cuda::activation_offset(i, j, kChunks))] =
            value(rank.rank, i, j);
      }
    }
    DeviceBuffer out(kCount * sizeof(bf16));
    args.out = out.as<void>();
    Extent extent = Extent::activations(kRows, kChunks);
    for (int i = 0; i < 3; ++i) extent.divide_columns(args.columns[0].owners);
    rank.send(mine);
    rank.comm.exchange(Collective::kAllGather, mine.size() * sizeof(bf16), "z", extent,
                       [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                         args.exchange = exchange;
                         return launch_gather_activations(args, stream);
                       });
    const auto got = rank.read<bf16>(out.as<void>(), kCount);
    for (int j = 0; j < kChunks * cuda::kTileCols; ++j) {
      int owner = 0;
      while (args.columns[0].owners.at[owner + 1] <= j) ++owner;
      const auto at = static_cast<std::size_t>(cuda::activation_offset(9, j, kChunks));
      ASSERT_EQ(got[at].bits, value(owner, 9, j).bits) << j;
    }
  });
}

TEST_F(CudaNccl, ARankThatDoesNotComeIsAnErrorThatNamesIt) {
  options_.timeout_s = 0.5;
  const auto start = std::chrono::steady_clock::now();
  expect_error(ErrorCode::kInternal, "waited 0.5 s for rank 1 in its exchange 3", [&] {
    on_nccl(3, [](const Rank& rank) {
      DeviceBuffer x = ones(rank, 64);
      rank.sum(2, x);
      rank.comm.synchronize();
      if (rank.rank == 1) return;
      rank.sum(50, x);
      rank.comm.synchronize();
      ADD_FAILURE() << "no error";
    });
  });
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(15));
  EXPECT_EQ(fake_.comms, 0);
}

TEST_F(CudaNccl, AnAbortFreesThoseWhoWait) {
  const int aborts = fake_.aborts;
  expect_error(ErrorCode::kUnsupported, "rank 2 has enough", [&] {
    on_nccl(3, [](const Rank& rank) {
      DeviceBuffer x = ones(rank, 64);
      rank.sum(1, x);
      rank.comm.synchronize();
      // A graph that has NCCL's work is there while it is aborted.
      rank.comm.begin_log();
      rank.stream.begin_capture();
      rank.sum(1, x);
      const cuda::Graph graph = rank.stream.end_capture();
      rank.comm.count_all(rank.comm.end_log());
      if (rank.rank == 2) fail(ErrorCode::kUnsupported, "rank 2 has enough");
      rank.stream.launch(graph);
      rank.comm.synchronize();
      ADD_FAILURE() << "no error";
    });
  });
  EXPECT_EQ(fake_.aborts - aborts, 3);
  EXPECT_EQ(fake_.comms, 0);
}

TEST_F(CudaNccl, FailuresOfNcclAreErrors) {
  auto exchange_once = [&](auto before) {
    return [this, before] {
      on_nccl(2, [before](const Rank& rank) {
        DeviceBuffer x = ones(rank, 64);
        rank.sum(1, x);
        rank.comm.synchronize();
        rank.comm.barrier();
        before();
        if (rank.rank == 0) rank.sum(1, x);
        rank.comm.synchronize();
      });
    };
  };
  fake_.init_result = 2;
  expect_error(ErrorCode::kInternal, "NCCL: ncclCommInitRank: fake error", exchange_once([] {}));
  fake_.init_result = 0;
  expect_error(ErrorCode::kInternal, "NCCL: an exchange: fake error",
               exchange_once([this] { fake_.async_error = 6; }));
  fake_.async_error = 0;
  expect_error(ErrorCode::kInternal, "NCCL: ncclSend: fake error",
               exchange_once([this] { fake_.send_result = 1; }));
  fake_.send_result = 0;
  EXPECT_EQ(fake_.comms, 0);
}

TEST_F(CudaNccl, IsTakenWhereDevicesCannotReadEachOther) {
  const std::vector<int> devices = test::nccl_devices(3);
  const std::uint64_t groups = fake_.groups;
  auto run = [&] {
    on_ranks(
        3, ExchangeOptions::from_environment(),
        [](const Rank& rank) {
          DeviceBuffer x = ones(rank, 8);
          rank.sum(1, x);
          EXPECT_EQ(rank.read<float>(x.as<void>(), 8), std::vector<float>(8, 3.0f));
        },
        devices);
  };
  run();
  EXPECT_EQ(fake_.groups, groups) << "they can";
  {
    Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
    run();
  }
  EXPECT_GT(fake_.groups, groups);
  emulation::device_state().reads_peers = false;
  const std::uint64_t more = fake_.groups;
  run();
  EXPECT_GT(fake_.groups, more);
  Setting transport("DEINFER_CUDA_TRANSPORT", "p2p");
  expect_error(ErrorCode::kUnsupported, "cannot read the memory of device", run);
}

TEST_F(CudaNccl, RefusesWhatItCannotDo) {
  const auto make = [](std::vector<int> devices) {
    return [devices] { make_device_group(devices, ExchangeOptions::from_environment()); };
  };
  test::nccl_devices(3);
  {
    Setting transport("DEINFER_CUDA_TRANSPORT", "infiniband");
    expect_error(ErrorCode::kInvalidArgument,
                 "DEINFER_CUDA_TRANSPORT=\"infiniband\" is unknown; use \"auto\"", make({0, 1, 2}));
  }
  Setting transport("DEINFER_CUDA_TRANSPORT", "nccl");
  expect_error(ErrorCode::kUnsupported, "ranks 0 and 2 share CUDA device 0", make({0, 1, 0}));
  {
    Setting lockstep("DEINFER_CUDA_LOCKSTEP", "1");
    expect_error(ErrorCode::kInvalidArgument, "DEINFER_CUDA_LOCKSTEP=1", make({0, 1, 2}));
  }
  fake_.version = 2803;
  expect_error(ErrorCode::kUnsupported, "is version 2.8.3, 2.9.0 or later is needed",
               make({0, 1, 2}));
  {
    Setting library("DEINFER_NCCL_LIBRARY", "/nowhere/libnccl.so.2");
    expect_error(ErrorCode::kUnsupported, "cannot load \"/nowhere/libnccl.so.2\"", make({0, 1, 2}));
    expect_error(ErrorCode::kUnsupported, "pip install nvidia-nccl", make({0, 1, 2}));
  }
  Setting library("DEINFER_NCCL_LIBRARY", "libm.so.6");
  expect_error(ErrorCode::kUnsupported, "\"libm.so.6\" has no ncclGetVersion", make({0, 1, 2}));
}

TEST(NcclLibrary, SaysVersionsAsNcclDoes) {
  EXPECT_EQ(nccl::version_text(2708), "2.7.8");
  EXPECT_EQ(nccl::version_text(20901), "2.9.1");
  EXPECT_EQ(nccl::version_text(23203), "2.32.3");
}

}  // namespace
}  // namespace deinfer

// Exchanges between ranks on devices: what they receive, for any number of ranks and blocks, over
// many epochs, in graphs and in lockstep; and how a rank that does not come ends them.
#include <gtest/gtest.h>

#include <chrono>
#include <exception>
#include <numeric>
#include <random>
#include <thread>

#include "base/check.h"
#include "comm/local.h"
#include "comm/p2p.h"
#include "cuda_fixture.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;

/// One rank: a thread with a stream.
struct Rank {
  int rank;
  int size;
  P2pCommunicator& comm;
  cuda::DeviceStream& stream;

  template <typename T>
  std::vector<T> read(const void* data, std::size_t count) const {
    std::vector<T> values(count);
    stream.download(values.data(), data, count * sizeof(T));
    stream.synchronize();
    comm.check();
    return values;
  }
  template <typename T>
  void send(const std::vector<T>& values) const {
    stream.upload(comm.send(), values.data(), values.size() * sizeof(T));
    if (!comm.lockstep()) return;  // `values` must live until the stream has taken them
    stream.synchronize();
  }
};

class CudaExchange : public test::CudaDeviceTest {
 protected:
  static constexpr std::size_t kBytes = 64 << 10;

  /// f(rank) on a thread each; what one throws is thrown.
  static void on_ranks(int size, const P2pOptions& options,
                       const std::function<void(const Rank&)>& f) {
    LocalGroup local(size, 1024);
    P2pGroup group(std::vector<int>(static_cast<std::size_t>(size), 0), options);
    std::vector<std::unique_ptr<P2pCommunicator>> ends;
    for (int rank = 0; rank < size; ++rank) {
      ends.push_back(group.communicator(local.communicator(rank)));
    }
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        const auto index = static_cast<std::size_t>(rank);
        try {
          cuda::use_device(0);
          cuda::DeviceStream stream;
          ends[index]->open(kBytes, stream);
          ends[index]->begin_step();
          f({rank, size, *ends[index], stream});
          ends[index]->end_step();
          stream.synchronize();
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
      for (bool lockstep : {false, true}) {
        for (int order = 0; order < std::min(test::kThreadOrders, 3); ++order) {
          SCOPED_TRACE(str_cat(size, " ranks, lockstep ", lockstep, ", order ", order));
          test::set_thread_order(order);
          P2pOptions options;
          options.lockstep = lockstep;
          options.max_blocks = 1 + order;
          on_ranks(size, options, f);
        }
      }
    }
  }
};

/// What rank `rank` contributes: whole numbers, so that sums are exact.
std::vector<float> numbers(int rank, int count, int seed = 0) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::mt19937 random(static_cast<unsigned>(100 * seed + rank));
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 201) - 100);
  return values;
}

/// The sum of numbers() over ranks.
std::vector<float> sums(int size, int count, int seed = 0) {
  std::vector<float> all(static_cast<std::size_t>(count), 0.0f);
  for (int r = 0; r < size; ++r) {
    const std::vector<float> theirs = numbers(r, count, seed);
    for (std::size_t i = 0; i < all.size(); ++i) all[i] += theirs[i];
  }
  return all;
}

cuda::Borders borders(int count, int size) {
  cuda::Borders all;
  for (int r = 0; r <= size; ++r) all.at[r] = count * r / size;
  return all;
}

TEST_F(CudaExchange, SumsColumnsAndRows) {
  constexpr int kRows = 4, kCols = 1025, kLd = 1032, kFirstRow = 1, kFirstCol = 4;
  in_every_way([](const Rank& rank) {
    const std::vector<float> bias = numbers(50, kCols);
    const std::vector<float> before = numbers(51, kRows * kCols);
    DeviceBuffer out(before.size() * sizeof(float)), bias_there(bias.size() * sizeof(float));
    rank.stream.upload(bias_there.as<void>(), bias.data(), bias_there.size());
    const std::vector<float> sum = sums(rank.size, kRows * kLd);
    const std::vector<float> mine = numbers(rank.rank, kRows * kLd);
    for (bool adds : {true, false}) {
      rank.stream.upload(out.as<void>(), before.data(), out.size());
      rank.send(mine);
      rank.comm.exchange(Collective::kAllReduce, mine.size() * sizeof(float), "sum",
                         [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                           cuda::ReduceLaunch args;
                           args.exchange = exchange;
                           args.first_row = kFirstRow;
                           args.rows = kRows - kFirstRow;
                           args.first_col = kFirstCol;
                           args.cols = kCols;
                           args.ld = kLd;
                           args.sink = adds ? cuda::ReduceSink::kAdd : cuda::ReduceSink::kFloat;
                           args.out = out.as<void>();
                           args.out_ld = kCols;
                           args.bias = bias_there.as<float>();
                           return launch_reduce(args, stream);
                         });
      std::vector<float> expected = before;
      for (int i = kFirstRow; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) {
          float& value = expected[static_cast<std::size_t>(i * kCols + j)];
          value = (adds ? value : 0.0f) + bias[static_cast<std::size_t>(j)] +
                  sum[static_cast<std::size_t>(i * kLd + kFirstCol + j)];
        }
      }
      EXPECT_EQ(rank.read<float>(out.as<void>(), before.size()), expected);
    }
  });
}

/// The sums of products with normalised rows are those of the whole rows.
TEST_F(CudaExchange, CompletesNormsAfterV) {
  constexpr int kRows = 3, kWidth = 56, kCols = 32, kLd = kCols + 4;
  for (int kind : {1, 2}) {
    in_every_way([kind](const Rank& rank) {
      const std::vector<float> x = numbers(60, kRows * kWidth), v = numbers(61, kCols * kWidth),
                               gain = numbers(62, kWidth), bias = numbers(63, kWidth);
      auto at = [](const std::vector<float>& matrix, int i, int j, int ld) {
        return static_cast<double>(matrix[static_cast<std::size_t>(i * ld + j)]);
      };
      const cuda::Borders shares = borders(kWidth, rank.size);
      std::vector<float> part(kRows * kLd), gains(static_cast<std::size_t>(rank.size * kCols)),
          biases(kCols);
      std::vector<double> expected;
      for (int i = 0; i < kRows; ++i) {
        const auto [begin, end] = std::pair(shares.at[rank.rank], shares.at[rank.rank + 1]);
        auto mean_of = [&](int first, int last) {
          double sum = 0;
          for (int k = first; k < last; ++k) sum += at(x, i, k, kWidth);
          return kind == 2 ? sum / (last - first) : 0.0;
        };
        auto squares_of = [&](int first, int last) {
          double sum = 0;
          for (int k = first; k < last; ++k) {
            sum += std::pow(at(x, i, k, kWidth) - mean_of(first, last), 2);
          }
          return sum;
        };
        float* row = part.data() + i * kLd;
        row[kCols] = static_cast<float>(kind == 2 ? mean_of(begin, end) : squares_of(begin, end));
        if (kind == 2) row[kCols + 1] = static_cast<float>(squares_of(begin, end));
        for (int c = 0; c < kCols; ++c) {
          double own = 0, whole = 0;
          for (int k = 0; k < kWidth; ++k) {
            const double product = at(v, c, k, kWidth) * gain[static_cast<std::size_t>(k)];
            if (k >= begin && k < end) {
              own += product * (at(x, i, k, kWidth) - mean_of(begin, end));
            }
            whole += product * (at(x, i, k, kWidth) - mean_of(0, kWidth));
            if (i > 0) continue;
            int owner = 0;
            while (shares.at[owner + 1] <= k) ++owner;
            gains[static_cast<std::size_t>(owner * kCols + c)] += static_cast<float>(product);
            biases[static_cast<std::size_t>(c)] +=
                static_cast<float>(at(v, c, k, kWidth) * bias[static_cast<std::size_t>(k)]);
          }
          row[c] = static_cast<float>(own);
          expected.push_back(whole / std::sqrt(squares_of(0, kWidth) / kWidth + 0.5));
        }
      }
      DeviceBuffer gains_there(gains.size() * sizeof(float)), biases_there(kCols * sizeof(float));
      rank.stream.upload(gains_there.as<void>(), gains.data(), gains_there.size());
      rank.stream.upload(biases_there.as<void>(), biases.data(), biases_there.size());
      DeviceBuffer out(std::size_t{8} * 32 * sizeof(bf16));
      rank.send(part);
      rank.comm.exchange(Collective::kAllReduce, part.size() * sizeof(float), "z",
                         [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                           cuda::ReduceLaunch args;
                           args.exchange = exchange;
                           args.rows = kRows;
                           args.cols = kCols;
                           args.ld = kLd;
                           args.sink = cuda::ReduceSink::kActivation;
                           args.out = out.as<void>();
                           args.out_ld = 1;
                           args.norm = {kind, 0.5f, kCols, {}, kWidth};
                           for (int r = 0; r < rank.size; ++r) {
                             args.norm.shares[r] = shares.at[r + 1] - shares.at[r];
                           }
                           args.terms[0] = {kCols, gains_there.as<float>(),
                                            biases_there.as<float>()};
                           return launch_reduce(args, stream);
                         });
      const auto z = rank.read<bf16>(out.as<void>(), 8 * 32);
      for (int i = 0; i < kRows; ++i) {
        for (int c = 0; c < kCols; ++c) {
          const double wanted = expected[static_cast<std::size_t>(i * kCols + c)] +
                                (kind == 2 ? biases[static_cast<std::size_t>(c)] : 0.0f);
          const auto place = static_cast<std::size_t>(cuda::activation_offset(i, c, 1));
          EXPECT_NEAR(to_float(z[place]), wanted, 0.004 * std::abs(wanted) + 0.5);
        }
      }
    });
  }
}

TEST_F(CudaExchange, GathersActivationsByColumnsAndByRows) {
  constexpr int kRows = 11, kFirstRank = 37, kSecondRank = 3, kChunks = 3;
  in_every_way([](const Rank& rank) {
    const auto count = std::size_t{16} * kChunks * cuda::kTileCols;
    auto value = [](int owner, int row, int col) {
      return to_bf16(static_cast<float>(owner * 64 + (row * 7 + col) % 61));
    };
    std::vector<bf16> mine(count);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kChunks * cuda::kTileCols; ++j) {
        mine[static_cast<std::size_t>(cuda::activation_offset(i, j, kChunks))] =
            value(rank.rank, i, j);
      }
    }
    for (bool by_rows : {false, true}) {
      DeviceBuffer out(count * sizeof(bf16));
      cuda::GatherActivationsLaunch args;
      args.rows = kRows;
      args.chunks = kChunks;
      args.by_rows = by_rows;
      args.owners = borders(kRows, rank.size);
      args.num_columns = 2;
      args.columns[0] = {0, 64, borders(kFirstRank, rank.size)};
      args.columns[1] = {64, 32, borders(kSecondRank, rank.size)};
      args.out = out.as<void>();
      args.out_chunks = kChunks;
      rank.send(mine);
      rank.comm.exchange(Collective::kAllGather, mine.size() * sizeof(bf16), "z",
                         [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                           args.exchange = exchange;
                           return launch_gather_activations(args, stream);
                         });
      const auto got = rank.read<bf16>(out.as<void>(), count);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kChunks * cuda::kTileCols; ++j) {
          const cuda::Borders& owners = by_rows ? args.owners : args.columns[j / 64].owners;
          const int index = by_rows ? i : j % 64;
          int owner = 0;
          while (owner < rank.size && owners.at[owner + 1] <= index) ++owner;
          const bf16 wanted = owner < rank.size ? value(owner, i, j) : bf16{};
          const auto at = static_cast<std::size_t>(cuda::activation_offset(i, j, kChunks));
          ASSERT_EQ(got[at].bits, wanted.bits) << i << ", " << j;
        }
      }
    }
  });
}

TEST_F(CudaExchange, GathersRowsOfNumbers) {
  constexpr int kRows = 7, kCols = 45, kLd = 48;
  in_every_way([](const Rank& rank) {
    const std::vector<float> mine = numbers(rank.rank, kRows * kLd);
    const std::vector<int> rows = {0, 2, 2, 5, 11, 12, 12};
    DeviceBuffer list(rows.size() * sizeof(int));
    rank.stream.upload(list.as<void>(), rows.data(), list.size());
    for (bool by_rows : {false, true}) {
      DeviceBuffer out(std::size_t{kRows} * kCols * sizeof(float));
      rank.stream.clear(out);
      cuda::GatherFloatsLaunch args;
      args.rows = kRows;
      args.cols = kCols;
      args.ld = kLd;
      args.by_rows = by_rows;
      args.owners = borders(by_rows ? 13 : kCols, rank.size);
      args.row_of = by_rows ? list.as<int>() : nullptr;
      args.adds = true;
      args.out = out.as<float>();
      args.out_ld = kCols;
      rank.send(mine);
      rank.comm.exchange(Collective::kAllGather, mine.size() * sizeof(float), "rows",
                         [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                           args.exchange = exchange;
                           return launch_gather_floats(args, stream);
                         });
      const auto got = rank.read<float>(out.as<void>(), std::size_t{kRows} * kCols);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) {
          const int index = by_rows ? rows[static_cast<std::size_t>(i)] : j;
          int owner = 0;
          while (args.owners.at[owner + 1] <= index) ++owner;
          ASSERT_EQ(got[static_cast<std::size_t>(i * kCols + j)],
                    numbers(owner, kRows * kLd)[static_cast<std::size_t>(i * kLd + j)])
              << i << ", " << j;
        }
      }
    }
  });
}

TEST_F(CudaExchange, FindsTheBestTokenOfAllRanks) {
  in_every_way([](const Rank& rank) {
    // Row 0: the last rank's; row 1: equal ones, of which the first counts; row 2: nothing.
    const auto last = static_cast<float>(rank.rank);
    const std::vector<cuda::RankCandidate> mine = {
        {last, 10 * rank.rank}, {5.0f, 10 * rank.rank + 1}, {-INFINITY, 10 * rank.rank + 2}};
    DeviceBuffer tokens(3 * sizeof(int));
    rank.send(mine);
    rank.comm.exchange(Collective::kGather, mine.size() * sizeof(cuda::RankCandidate),
                       "most_likely", [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                         cuda::BestOfRanksLaunch args{exchange, 3, 0xffu, tokens.as<int>()};
                         if (exchange.size > 1) args.ranks &= ~1u;  // rank 0 has no vocabulary
                         return launch_best_of_ranks(args, stream);
                       });
    const int first = rank.size > 1 ? 10 : 0;
    EXPECT_EQ(rank.read<int>(tokens.as<void>(), 3),
              (std::vector<int>{10 * (rank.size - 1), first + 1, first + 2}));
  });
}

/// A chain of sums, each of what the one before gave: a stale or torn contribution would show.
void run_epochs(const Rank& rank, int count, const DeviceBuffer& x, int n) {
  for (int i = 0; i < count; ++i) {
    cuda::NormLaunch copy;  // contributes x
    copy.x = x.as<float>();
    copy.ld = copy.out_ld = n;
    copy.m = 1;
    copy.n = n;
    copy.out_float = reinterpret_cast<float*>(rank.comm.send());
    cuda::check_launch(launch_norm(copy, rank.stream.get()), "copy");
    rank.comm.exchange(Collective::kAllReduce, static_cast<std::size_t>(n) * sizeof(float), "epoch",
                       [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                         cuda::ReduceLaunch args;
                         args.exchange = exchange;
                         args.rows = 1;
                         args.cols = args.ld = args.out_ld = n;
                         args.out = x.as<void>();
                         return launch_reduce(args, stream);
                       });
  }
}

TEST_F(CudaExchange, KeepsManyEpochsApart) {
  for (int size : {2, 8}) {
    P2pOptions options;
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
        run_epochs(rank, 5, x, n);
        const std::vector<float> expected(n, static_cast<float>(std::pow(rank.size, 5)));
        ASSERT_EQ(rank.read<float>(x.as<void>(), n), expected) << "round " << round;
      }
    });
  }
}

TEST_F(CudaExchange, RunsInGraphs) {
  on_ranks(3, {}, [](const Rank& rank) {
    constexpr int n = 36;
    DeviceBuffer x(n * sizeof(float));
    const std::vector<float> ones(n, 1.0f);
    run_epochs(rank, 1, x, n);  // kernels load at their first launch
    rank.comm.make_even();
    rank.stream.synchronize();
    rank.comm.begin_log();
    rank.stream.begin_capture();
    run_epochs(rank, 3, x, n);
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

TEST_F(CudaExchange, ARankThatDoesNotComeIsAnErrorThatNamesIt) {
  P2pOptions options;
  options.timeout_s = 1.5;
  const auto start = std::chrono::steady_clock::now();
  try {
    on_ranks(3, options, [](const Rank& rank) {
      DeviceBuffer x(64 * sizeof(float));
      run_epochs(rank, 2, x, 64);
      rank.stream.synchronize();
      rank.comm.check();
      if (rank.rank == 1) return;
      run_epochs(rank, 50, x, 64);  // which all end at once after the first
      rank.stream.synchronize();
      rank.comm.check();
      ADD_FAILURE() << "no error";
    });
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(
        std::string(error.what()).find("waited 1.5 s for rank 1 in its exchange 3, \"epoch\""),
        std::string::npos)
        << error.what();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST_F(CudaExchange, AnAbortFreesThoseWhoWait) {
  for (bool lockstep : {false, true}) {
    P2pOptions options;
    options.lockstep = lockstep;
    try {
      on_ranks(3, options, [](const Rank& rank) {
        DeviceBuffer x(64 * sizeof(float));
        if (rank.rank == 2) fail(ErrorCode::kUnsupported, "rank 2 has enough");
        run_epochs(rank, 2, x, 64);
        rank.stream.synchronize();
        rank.comm.check();
        ADD_FAILURE() << "no error";
      });
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_STREQ(error.what(), "rank 2 has enough");
    }
  }
}

TEST_F(CudaExchange, RefusesTooManyRanks) {
  EXPECT_THROW(P2pGroup(std::vector<int>(9, 0), {}), Error);
}

}  // namespace
}  // namespace deinfer

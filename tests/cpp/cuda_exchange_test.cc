// Exchanges between ranks on devices: what they receive, for any number of ranks and blocks, and in
// lockstep.
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "cuda_exchange_fixture.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using test::Rank;

class CudaExchange : public test::CudaExchangeTest {};

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
                         Extent::floats(kRows, kLd),
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
      rank.comm.exchange(
          Collective::kAllReduce, part.size() * sizeof(float), "z", Extent::floats(kRows, kLd),
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
            args.terms[0] = {kCols, gains_there.as<float>(), biases_there.as<float>()};
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
      Extent extent = Extent::activations(kRows, kChunks);
      if (by_rows) {
        extent.divide_rows(args.owners);
      } else {
        for (int i : {0, 1}) extent.divide_columns(args.columns[i].owners, args.columns[i].first);
      }
      rank.comm.exchange(Collective::kAllGather, mine.size() * sizeof(bf16), "z", extent,
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
      Extent extent = Extent::floats(kRows, kLd);
      if (!by_rows) extent.divide_columns(args.owners);
      rank.comm.exchange(Collective::kAllGather, mine.size() * sizeof(float), "rows", extent,
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
                       "most_likely", Extent::floats(3, 2),
                       [&](const cuda::PeerExchange& exchange, cuda::Stream stream) {
                         cuda::BestOfRanksLaunch args{exchange, 3, 0xffu, tokens.as<int>()};
                         if (exchange.size > 1) args.ranks &= ~1u;  // rank 0 has no vocabulary
                         return launch_best_of_ranks(args, stream);
                       });
    const int first = rank.size > 1 ? 10 : 0;
    const auto best = rank.read<int>(tokens.as<void>(), 3);
    if (rank.rank != 0) return;  // which alone gathers
    EXPECT_EQ(best, (std::vector<int>{10 * (rank.size - 1), first + 1, first + 2}));
  });
}

}  // namespace
}  // namespace deinfer

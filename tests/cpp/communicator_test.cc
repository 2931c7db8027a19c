#include "comm/communicator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "comm/emulated_link.h"
#include "comm/local.h"
#include "deinfer/error.h"
#include "rank_threads.h"

namespace deinfer {
namespace {

constexpr std::size_t kMaxBytes = 1000;

/// Groups of every kind there is.
struct Kind {
  const char* name;
  std::function<Ranks(int size)> make;
};

std::vector<Kind> kinds(int size) {
  auto local = [](int n) {
    LocalGroup group(n, kMaxBytes);  // its communicators outlive it
    return communicators(group);
  };
  auto emulated = [](int n) {
    LocalGroup group(n, kMaxBytes + kEmulatedLinkHeaderBytes);
    Ranks ranks;
    for (std::unique_ptr<Communicator>& rank : communicators(group)) {
      ranks.push_back(make_emulated_link(std::move(rank), parse_link_model("1:1000")));
    }
    return ranks;
  };
  auto single = [](int) {
    Ranks ranks;
    ranks.push_back(make_single_communicator(kMaxBytes));
    return ranks;
  };
  std::vector<Kind> all = {{"local", local}, {"emulated", emulated}};
  if (size == 1) all.push_back({"single", single});
  return all;
}

/// body(kind, ranks) for groups of every kind and of 1 to 8 ranks.
template <typename Body>
void for_all_groups(Body body) {
  for (int size : {1, 2, 3, 4, 8}) {
    for (const Kind& kind : kinds(size)) {
      SCOPED_TRACE(std::string(kind.name) + " of " + std::to_string(size));
      Ranks ranks = kind.make(size);
      body(size, ranks);
    }
  }
}

/// Numbers whose sums are rounded, the same for everyone who asks.
float number(int rank, std::size_t i) {
  std::uint32_t x = static_cast<std::uint32_t>(rank) * 0x9e3779b9u + static_cast<std::uint32_t>(i);
  x = (x ^ (x >> 15)) * 0x2c1b3c6du;
  x = (x ^ (x >> 12)) * 0x297a2d39u;
  return static_cast<float>(x >> 8) / 16777216.0f - 0.5f;
}

float sum_in_rank_order(int size, std::size_t i) {
  float sum = number(0, i);
  for (int rank = 1; rank < size; ++rank) sum += number(rank, i);
  return sum;
}

template <typename Function>
std::string message_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "no error";
}

void expect_mention(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message;
}

// 250 floats go in one exchange.
const std::vector<std::size_t> kCounts = {0, 1, 7, 64, 249, 250, 251, 1001};

TEST(Communicator, AllReduceHasTheBitsOfSumsInRankOrder) {
  for_all_groups([](int size, Ranks& ranks) {
    run_ranks(ranks, [&](Communicator& comm) {
      for (std::size_t count : kCounts) {
        std::vector<float> data(count);
        for (std::size_t i = 0; i < count; ++i) data[i] = number(comm.rank(), i);
        comm.all_reduce(data.data(), count);
        for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(data[i], sum_in_rank_order(size, i));
      }
    });
  });
}

TEST(Communicator, ReduceScatterGivesEachRankItsSums) {
  for_all_groups([](int size, Ranks& ranks) {
    run_ranks(ranks, [&](Communicator& comm) {
      for (std::size_t count : kCounts) {
        std::vector<float> data(count * static_cast<std::size_t>(size));
        for (std::size_t i = 0; i < data.size(); ++i) data[i] = number(comm.rank(), i);
        std::vector<float> out(count);
        comm.reduce_scatter(data.data(), count, out.data());
        std::size_t first = count * static_cast<std::size_t>(comm.rank());
        for (std::size_t i = 0; i < count; ++i) {
          ASSERT_EQ(out[i], sum_in_rank_order(size, first + i));
        }
      }
    });
  });
}

TEST(Communicator, AllGatherAndBroadcastMoveBytes) {
  auto byte = [](int rank, std::size_t i) { return static_cast<char>(i * 7 + i / 256) + rank; };
  for_all_groups([&](int size, Ranks& ranks) {
    run_ranks(ranks, [&](Communicator& comm) {
      for (std::size_t bytes : {0u, 1u, 63u, 999u, 1000u, 1001u, 3003u}) {
        std::vector<char> part(bytes);
        for (std::size_t i = 0; i < bytes; ++i) {
          part[i] = static_cast<char>(byte(comm.rank(), i));
        }
        std::vector<char> all(bytes * static_cast<std::size_t>(size));
        comm.all_gather(part.data(), bytes, all.data());
        for (std::size_t i = 0; i < all.size(); ++i) {
          int from = static_cast<int>(i / bytes);
          ASSERT_EQ(all[i], static_cast<char>(byte(from, i % bytes)));
        }
        int root = static_cast<int>(bytes) % size;
        comm.broadcast(part.data(), bytes, root);
        for (std::size_t i = 0; i < bytes; ++i) {
          ASSERT_EQ(part[i], static_cast<char>(byte(root, i)));
        }
      }
    });
  });
}

TEST(Communicator, NoRankLeavesABarrierBeforeAllHaveCome) {
  for_all_groups([](int size, Ranks& ranks) {
    std::atomic<int> came{0};
    run_ranks(ranks, [&](Communicator& comm) {
      for (int round = 1; round <= 50; ++round) {
        ++came;
        comm.barrier();
        ASSERT_GE(came, round * size);
        comm.barrier();
      }
    });
  });
}

TEST(Communicator, SeveralExchangesMayBeUnderWay) {
  for_all_groups([](int size, Ranks& ranks) {
    run_ranks(ranks, [&](Communicator& comm) {
      for (int first = 0; first < 100; first += Communicator::kMaxInFlight) {
        std::vector<Ticket> tickets;
        for (int i = 0; i < Communicator::kMaxInFlight; ++i) {
          std::byte* slot = comm.contribution(sizeof(int));
          ASSERT_EQ(reinterpret_cast<std::uintptr_t>(slot) % 64, 0u);
          int value = (first + i) * size + comm.rank();
          std::memcpy(slot, &value, sizeof(value));
          // Asked for twice it is the same memory, and not all of it need be sent.
          ASSERT_EQ(comm.contribution(comm.max_bytes()), slot);
          Ticket next = comm.next_ticket();
          tickets.push_back(comm.start(Collective::kGather, sizeof(int)));
          ASSERT_EQ(tickets.back(), next);
        }
        // The last first: waiting has no order, finishing has.
        for (int i = Communicator::kMaxInFlight - 1; i >= 0; --i) {
          Ticket ticket = tickets[static_cast<std::size_t>(i)];
          comm.wait(ticket);
          for (int rank = 0; rank < size; ++rank) {
            int value = 0;
            std::memcpy(&value, comm.contribution_of(rank, ticket), sizeof(value));
            ASSERT_EQ(value, (first + i) * size + rank);
          }
        }
        for (Ticket ticket : tickets) comm.finish(ticket);
      }
    });
  });
}

TEST(Communicator, CountsWhatTheFormulasSay) {
  for_all_groups([](int size, Ranks& ranks) {
    run_ranks(ranks, [&](Communicator& comm) {
      std::vector<float> data(8 * 250);
      std::vector<float> out(8 * 250);
      comm.all_reduce(data.data(), 7);
      comm.all_reduce(data.data(), 9);
      comm.all_gather(data.data(), 101, out.data());
      comm.reduce_scatter(data.data(), 5, out.data());
      comm.broadcast(data.data(), 77, size - 1);
      comm.barrier();
      comm.contribution(55);
      Ticket ticket = comm.start(Collective::kGather, 55);
      comm.wait(ticket);
      comm.finish(ticket);
    });
    auto n = static_cast<std::uint64_t>(size);
    for (const std::unique_ptr<Communicator>& comm : ranks) {
      auto expect = [&](Collective kind, std::uint64_t calls, std::uint64_t bytes,
                        std::uint64_t wire) {
        const TrafficCounter& counter = comm->traffic()[static_cast<std::size_t>(kind)];
        EXPECT_EQ(counter.calls, calls) << collective_name(kind);
        EXPECT_EQ(counter.bytes, bytes) << collective_name(kind);
        EXPECT_EQ(counter.wire_bytes, wire) << collective_name(kind);
      };
      expect(Collective::kAllReduce, 2, 64, 2 * (n - 1) * 28 / n + 2 * (n - 1) * 36 / n);
      expect(Collective::kAllGather, 1, 101, (n - 1) * 101);
      expect(Collective::kReduceScatter, 1, 20 * n, (n - 1) * 20);
      expect(Collective::kBroadcast, 1, 77, (n - 1) * 77 / n);
      expect(Collective::kGather, 1, 55, (n - 1) * 55 / n);
      expect(Collective::kBarrier, 1, 0, 0);
    }
  });
}

TEST(Communicator, MisuseIsNamed) {
  for (const Kind& kind : kinds(1)) {
    SCOPED_TRACE(kind.name);
    Ranks ranks = kind.make(1);
    Communicator& comm = *ranks[0];
    ASSERT_EQ(comm.max_bytes(), kMaxBytes);
    expect_mention(message_of([&] { comm.contribution(kMaxBytes + 1); }), "1001");
    expect_mention(message_of([&] { comm.start(Collective::kGather, 8); }), "without contribution");
    expect_mention(message_of([&] { comm.wait(0); }), "exchange 0 was not started");
    expect_mention(message_of([&] { comm.contribution_of(0, 0); }), "exchange 0 was not started");
    expect_mention(message_of([&] { comm.finish(0); }), "exchange 0 was not started");
    comm.contribution(8);
    EXPECT_NE(message_of([&] { comm.start(Collective::kGather, 9); }), "no error");
    comm.start(Collective::kGather, 8);
    for (int i = 1; i < Communicator::kMaxInFlight; ++i) {
      comm.contribution(8);
      comm.start(Collective::kGather, 8);
    }
    expect_mention(message_of([&] { comm.contribution(8); }), "4 exchanges are under way");
    expect_mention(message_of([&] { comm.finish(1); }), "the next is 0, got 1");
    expect_mention(message_of([&] { comm.contribution_of(1, 0); }), "no rank 1");
    expect_mention(message_of([&] { comm.contribution_of(-1, 0); }), "no rank -1");
    for (Ticket ticket = 0; ticket < 4; ++ticket) comm.finish(ticket);
    expect_mention(message_of([&] { comm.contribution_of(0, 3); }), "exchange 3 is finished");
    expect_mention(message_of([&] { comm.finish(3); }), "the next is 4");
    float data[2] = {};
    expect_mention(message_of([&] { comm.broadcast(data, 8, 1); }), "no rank 1 among 1");
  }
  float data[2] = {};
  std::unique_ptr<Communicator> tiny = make_single_communicator(3);
  expect_mention(message_of([&] { tiny->all_reduce(data, 1); }), "all_reduce");
  expect_mention(message_of([&] { tiny->reduce_scatter(data, 1, data); }), "reduce_scatter");
  EXPECT_NE(message_of([] { LocalGroup(0, 8); }), "no error");
  expect_mention(message_of([] { LocalGroup(65, 8); }), "got 65");
  EXPECT_NE(message_of([] { LocalGroup(1, ~std::size_t{0}); }), "no error");
  LocalGroup group(2, 8);
  expect_mention(message_of([&] { group.communicator(2); }), "no rank 2");
  std::unique_ptr<Communicator> first = group.communicator(0);
  expect_mention(message_of([&] { group.communicator(0); }), "taken");
}

/// The same random exchanges on all ranks, up to kMaxInFlight of them under way; every number is
/// checked. at_step(i) runs between the steps.
void random_exchanges(Communicator& comm, unsigned seed, int exchanges,
                      const std::function<void(int)>& at_step) {
  std::mt19937 random(seed);
  struct UnderWay {
    Ticket ticket;
    std::size_t count;
  };
  std::vector<UnderWay> under_way;
  int steps = 0;
  auto finish_oldest = [&] {
    UnderWay oldest = under_way.front();
    under_way.erase(under_way.begin());
    comm.wait(oldest.ticket);
    at_step(++steps);
    for (int rank = 0; rank < comm.size(); ++rank) {
      auto* floats = reinterpret_cast<const float*>(comm.contribution_of(rank, oldest.ticket));
      for (std::size_t i = 0; i < oldest.count; ++i) {
        ASSERT_EQ(floats[i], number(rank, oldest.ticket * 1000 + i));
      }
    }
    comm.finish(oldest.ticket);
  };
  for (int exchange = 0; exchange < exchanges; ++exchange) {
    while (under_way.size() == Communicator::kMaxInFlight ||
           (!under_way.empty() && random() % 3 == 0)) {
      finish_oldest();
    }
    std::size_t count = random() % 33;
    auto* floats = reinterpret_cast<float*>(comm.contribution(count * sizeof(float)));
    at_step(++steps);
    auto next = static_cast<std::size_t>(exchange) * 1000;
    for (std::size_t i = 0; i < count; ++i) floats[i] = number(comm.rank(), next + i);
    Ticket ticket = comm.start(Collective::kAllGather, count * sizeof(float));
    ASSERT_EQ(ticket, static_cast<Ticket>(exchange));
    under_way.push_back({ticket, count});
    at_step(++steps);
  }
  while (!under_way.empty()) finish_oldest();
}

TEST(LocalGroup, ThousandsOfRandomExchangesAmongEightThreads) {
  LocalGroup group(8, 256);
  Ranks ranks = communicators(group);
  run_ranks(ranks, [](Communicator& comm) { random_exchanges(comm, 1, 3000, [](int) {}); });
  EXPECT_EQ(ranks[7]->traffic()[static_cast<std::size_t>(Collective::kAllGather)].calls, 3000u);
}

TEST(LocalGroup, AThousandAbortsReleaseEveryRankAndKeepTheCause) {
  std::mt19937 random(2);
  for (int round = 0; round < 1000; ++round) {
    int size = 2 + round % 3;
    LocalGroup group(size, 256);
    Ranks ranks = communicators(group);
    int failing = static_cast<int>(random() % static_cast<unsigned>(size));
    int fails_at = 1 + static_cast<int>(random() % 30);
    try {
      run_ranks(ranks, [&](Communicator& comm) {
        random_exchanges(comm, static_cast<unsigned>(round), 40, [&](int i) {
          if (comm.rank() == failing && i == fails_at) {
            throw std::runtime_error("rank " + std::to_string(failing));
          }
        });
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) {
      ASSERT_EQ(std::string(error.what()), "rank " + std::to_string(failing));
    }
    for (std::unique_ptr<Communicator>& rank : ranks) {
      ASSERT_THROW(rank->barrier(), CommunicatorAborted);
    }
  }
}

TEST(LocalGroup, AbortFromOutsideReleasesWaitingRanks) {
  LocalGroup group(3, 64);
  Ranks ranks = communicators(group);
  std::thread aborting([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    group.abort();
  });
  EXPECT_THROW(run_ranks(ranks,
                         [](Communicator& comm) {
                           if (comm.rank() > 0) comm.barrier();
                         }),
               CommunicatorAborted);
  aborting.join();
}

}  // namespace
}  // namespace deinfer

// Times are bounded from below only, except where overlap needs a bound, which is a generous one.
#include "comm/emulated_link.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/local.h"
#include "deinfer/error.h"
#include "rank_threads.h"

namespace deinfer {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

Ranks linked(int size, const LinkModel& link) {
  LocalGroup group(size, 1 << 20);
  Ranks ranks;
  for (std::unique_ptr<Communicator>& rank : communicators(group)) {
    ranks.push_back(make_emulated_link(std::move(rank), link));
  }
  return ranks;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

Ticket start(Communicator& comm, Collective kind, std::size_t bytes) {
  comm.contribution(bytes);
  return comm.start(kind, bytes);
}

TEST(LinkModel, SecondsFollowTheFormulas) {
  LinkModel link{1e-5, 1e9};
  auto seconds = [&](Collective kind, std::size_t bytes) {
    return exchange_seconds(link, kind, bytes, 4);
  };
  // One shot: 10 us + 3 b; two: 15 us + 1.5 b.
  EXPECT_DOUBLE_EQ(seconds(Collective::kAllReduce, 1000), 1e-5 + 3e-6);
  EXPECT_DOUBLE_EQ(seconds(Collective::kAllReduce, 100000), 1.5e-5 + 1.5e-4);
  EXPECT_DOUBLE_EQ(seconds(Collective::kAllGather, 1000), 1e-5 + 3e-6);
  EXPECT_DOUBLE_EQ(seconds(Collective::kReduceScatter, 1000), 1e-5 + 0.75e-6);
  EXPECT_DOUBLE_EQ(seconds(Collective::kBroadcast, 1000), 1e-5 + 3e-6);
  EXPECT_DOUBLE_EQ(seconds(Collective::kGather, 1000), 1e-5 + 3e-6);
  EXPECT_DOUBLE_EQ(seconds(Collective::kBarrier, 0), 1e-5);
  EXPECT_EQ(exchange_seconds(link, Collective::kAllReduce, 1000, 1), 0);
}

TEST(LinkModel, IsParsedAndWrongTextsAreNamed) {
  EXPECT_DOUBLE_EQ(parse_link_model("nvlink").bytes_per_s, 405e9);
  EXPECT_DOUBLE_EQ(parse_link_model("pcie").latency_s, 20e-6);
  EXPECT_DOUBLE_EQ(parse_link_model("ethernet").bytes_per_s, 12.5e9);
  LinkModel link = parse_link_model("2.5:50");
  EXPECT_DOUBLE_EQ(link.latency_s, 2.5e-6);
  EXPECT_DOUBLE_EQ(link.bytes_per_s, 50e9);
  EXPECT_DOUBLE_EQ(parse_link_model("0:1").latency_s, 0);
  const std::vector<std::pair<const char*, const char*>> wrong = {
      {"infiniband", "infiniband"},
      {"", "\"\""},
      {"x:50", "\"x\""},
      {"3:", "bandwidth in GB/s is not a number: \"\""},
      {"3:5 ", "\"5 \""},
      {"3:5:7", "\"5:7\""},
      {"-3:5", "-3 us"},
      {"3:0", "0 GB/s"},
      {"nan:5", "\"nan\""},
      {"3:inf", "\"inf\""},
  };
  for (auto [text, part] : wrong) {
    try {
      parse_link_model(text);
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(make_emulated_link(make_single_communicator(63), link), Error);
  EXPECT_THROW(make_emulated_link(make_single_communicator(64), LinkModel{}), Error);
}

TEST(EmulatedLink, NoRankIsThroughBeforeTheDeadline) {
  LinkModel link{5e-3, 1e8};
  for (int size : {2, 3, 8}) {
    Ranks ranks = linked(size, link);
    std::atomic<Clock::rep> last_start{0};
    run_ranks(ranks, [&](Communicator& comm) {
      // The last rank starts late.
      if (comm.rank() == size - 1) {
        std::this_thread::sleep_for(milliseconds(10));
        last_start = Clock::now().time_since_epoch().count();
      }
      Ticket ticket = start(comm, Collective::kAllGather, 100000);
      comm.wait(ticket);
      Clock::time_point started{Clock::duration(last_start)};
      EXPECT_GE(seconds_since(started), 5e-3 + (size - 1) * 1e-3);
      comm.finish(ticket);
    });
  }
}

TEST(EmulatedLink, DataOfOneExchangeFollowThoseOfAnother) {
  Ranks ranks = linked(2, LinkModel{1e-3, 1e5});  // 1,000 bytes take 10 ms
  run_ranks(ranks, [&](Communicator& comm) {
    Clock::time_point before = Clock::now();
    for (int round = 1; round <= 2; ++round) {
      Ticket first = start(comm, Collective::kAllGather, 1000);
      Ticket second = start(comm, Collective::kAllGather, 1000);
      Ticket third = start(comm, Collective::kAllGather, 1000);
      // The second is not waited for, but the third comes after it all the same.
      if (round == 1) comm.wait(first);
      comm.wait(third);
      EXPECT_GE(seconds_since(before), round * 30e-3);
      for (Ticket ticket : {first, second, third}) comm.finish(ticket);
    }
  });
}

TEST(EmulatedLink, FinishingWithoutWaitingTakesItsTimeOnTheLink) {
  Ranks ranks = linked(2, LinkModel{1e-3, 1e5});
  run_ranks(ranks, [&](Communicator& comm) {
    Clock::time_point before = Clock::now();
    for (int i = 0; i < 2; ++i) comm.finish(start(comm, Collective::kAllGather, 1000));
    comm.barrier();
    EXPECT_GE(seconds_since(before), 21e-3);
  });
}

TEST(EmulatedLink, ComputationHidesTheExchange) {
  Ranks ranks = linked(2, LinkModel{200e-3, 1e9});
  run_ranks(ranks, [&](Communicator& comm) {
    comm.barrier();
    Ticket ticket = start(comm, Collective::kAllReduce, 64);
    std::this_thread::sleep_for(milliseconds(250));  // computes
    Clock::time_point before = Clock::now();
    comm.wait(ticket);
    EXPECT_LT(seconds_since(before), 190e-3);
    comm.finish(ticket);
  });
}

TEST(EmulatedLink, SeveralThreadsOfARankMayWait) {
  Ranks ranks = linked(2, LinkModel{0, 4e3});  // 8 bytes take 2 ms
  run_ranks(ranks, [&](Communicator& comm) {
    for (int round = 0; round < 10; ++round) {
      Clock::time_point before = Clock::now();
      Ticket first = start(comm, Collective::kGather, 8);
      Ticket second = start(comm, Collective::kGather, 8);
      std::vector<std::thread> threads;
      for (Ticket ticket : {second, first, second}) {
        threads.emplace_back([&, ticket] {
          comm.wait(ticket);
          EXPECT_GE(seconds_since(before), ticket == first ? 2e-3 : 4e-3);
        });
      }
      for (std::thread& thread : threads) thread.join();
      comm.finish(first);
      comm.finish(second);
    }
  });
}

TEST(EmulatedLink, LatenciesOverlap) {
  Ranks ranks = linked(2, LinkModel{200e-3, 1e9});
  run_ranks(ranks, [&](Communicator& comm) {
    comm.barrier();
    Clock::time_point before = Clock::now();
    Ticket first = start(comm, Collective::kAllReduce, 64);
    Ticket second = start(comm, Collective::kAllReduce, 64);
    comm.wait(first);
    comm.wait(second);
    EXPECT_LT(seconds_since(before), 390e-3);
    comm.finish(first);
    comm.finish(second);
  });
}

TEST(EmulatedLink, AbortEndsALongWait) {
  Ranks ranks = linked(2, LinkModel{1000, 1e9});
  EXPECT_THROW(run_ranks(ranks,
                         [](Communicator& comm) {
                           Ticket ticket = start(comm, Collective::kBarrier, 0);
                           if (comm.rank() == 0) throw std::runtime_error("rank 0");
                           comm.wait(ticket);
                         }),
               std::runtime_error);
}

}  // namespace
}  // namespace deinfer

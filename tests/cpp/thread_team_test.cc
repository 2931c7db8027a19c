#include "base/thread_team.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

#include "deinfer/error.h"

namespace deinfer {
namespace {

TEST(ThreadTeam, RunsEveryMemberAndShowsWritesAfterTheBarrier) {
  for (int size : {1, 2, 3, 5}) {
    ThreadTeam team(size);
    std::vector<int> values(static_cast<std::size_t>(size));
    std::vector<int> sums(static_cast<std::size_t>(size));
    for (int round = 1; round <= 200; ++round) {
      team.run([&](TeamMember& member) {
        auto id = static_cast<std::size_t>(member.id());
        values[id] = round * (member.id() + 1);
        member.barrier();
        sums[id] = std::accumulate(values.begin(), values.end(), 0);
        member.barrier();
        values[id] = 0;
      });
      for (int sum : sums) ASSERT_EQ(sum, round * size * (size + 1) / 2);
    }
  }
}

TEST(ThreadTeam, SharesCoverAllItemsOnce) {
  ThreadTeam team(3);
  for (int n : {0, 1, 2, 3, 10, 101}) {
    std::vector<std::pair<int, int>> shares(3);
    team.run([&](TeamMember& m) { shares[static_cast<std::size_t>(m.id())] = m.share(n); });
    EXPECT_EQ(shares[0].first, 0);
    EXPECT_EQ(shares[0].second, shares[1].first);
    EXPECT_EQ(shares[1].second, shares[2].first);
    EXPECT_EQ(shares[2].second, n);
  }
}

TEST(ThreadTeam, WorkRunsEveryItemOnce) {
  for (int size : {1, 2, 3, 7}) {
    ThreadTeam team(size);
    for (int items : {0, 1, 2, 5, 300}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(items));
      team.run([&](TeamMember& member) {
        for (int round = 0; round < 20; ++round) {
          auto [begin, end] = member.share(items);
          member.work(begin, end, [&](int item) { ++runs[static_cast<std::size_t>(item)]; });
          member.barrier();
        }
      });
      for (auto& run : runs) EXPECT_EQ(run, 20);
    }
  }
}

TEST(ThreadTeam, WorkThatASlowMemberHasNotBegunIsDoneByOthers) {
  constexpr int kItems = 100;
  ThreadTeam team(2);
  std::atomic<bool> stuck{false};
  std::atomic<int> done{0};
  std::atomic<int> by_slow{0};
  team.run([&](TeamMember& member) {
    while (member.id() == 0 && !stuck) std::this_thread::yield();
    auto [begin, end] = member.share(kItems);
    member.work(begin, end, [&](int) {
      if (member.id() == 1) {  // stuck in its first item until all others are done
        ++by_slow;
        stuck = true;
        while (done != kItems - 1) std::this_thread::yield();
      }
      ++done;
    });
    member.barrier();
  });
  EXPECT_EQ(done, kItems);
  EXPECT_EQ(by_slow, 1);
}

TEST(ThreadTeam, AnExceptionReleasesTheOthersAndLeavesTheTeamUsable) {
  ThreadTeam team(4);
  for (int round = 0; round < 100; ++round) {
    int failing = round % 4;
    try {
      team.run([&](TeamMember& member) {
        if (member.id() == failing) throw std::runtime_error("member " + std::to_string(failing));
        member.barrier();
        member.barrier();
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(std::string(error.what()), "member " + std::to_string(failing));
    }
    std::atomic<int> ran = 0;
    team.run([&](TeamMember& member) {
      member.barrier();
      ++ran;
    });
    EXPECT_EQ(ran, 4);
  }
}

TEST(ThreadTeam, RejectsAnEmptyTeam) { EXPECT_THROW(ThreadTeam(0), Error); }

TEST(ThreadTeam, SaysThatTheOsGivesNoMoreThreads) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP();  // address space cannot be limited
#endif
  rlimit before;
  getrlimit(RLIMIT_AS, &before);
  rlimit none{1 << 20, before.rlim_max};
  setrlimit(RLIMIT_AS, &none);
  std::string message;
  try {
    ThreadTeam team(100);
  } catch (const Error& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_AS, &before);
  EXPECT_NE(message.find("of 100"), std::string::npos) << message;
  int ran = 0;
  ThreadTeam(1).run([&](TeamMember&) { ++ran; });
  EXPECT_EQ(ran, 1);
}

}  // namespace
}  // namespace deinfer

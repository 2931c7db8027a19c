#include "base/wait_place.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/thread_team.h"
#include "rank_threads.h"

namespace deinfer {
namespace {

using std::chrono::milliseconds;

/// As when others want the cores, or as when they do not.
class Crowded {
 public:
  Crowded() { WaitPlace::avoid_yields(std::chrono::hours(1)); }
  ~Crowded() { WaitPlace::avoid_yields(milliseconds(0)); }
};

const std::vector<WaitManner> kManners = {
    {0, 0, false, {}}, {1, 0, false, {}}, {30, 0, false, {}},
    {0, 1, true, {}},  {3, 2, true, {}},  {},
};

/// Threads add one to `turn`, each when it is its turn.
void take_turns(int threads, int rounds, WaitManner manner) {
  WaitPlace place;
  std::atomic<int> turn{0};
  std::vector<std::thread> all;
  for (int id = 0; id < threads; ++id) {
    all.emplace_back([&, id] {
      for (int round = 0; round < rounds; ++round) {
        int mine = round * threads + id;
        place.wait([&] { return turn.load() == mine; }, manner);
        turn.store(mine + 1);
        place.wake();
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  EXPECT_EQ(turn.load(), threads * rounds);
}

TEST(WaitPlace, NoWakeUpIsLostWithFewerCoresThanThreads) {
  Crowded crowded;
  for (int threads : {2, 3, 8}) {
    for (const WaitManner& manner : kManners) take_turns(threads, 2000 / threads, manner);
  }
}

TEST(WaitPlace, SleepsEndByThemselvesWhereThereIsALimit) {
  WaitPlace place;
  std::atomic<bool> stored{false};
  std::thread thread([&] {
    auto ready = [&] { return stored.load(std::memory_order_acquire); };
    place.wait(ready, {0, 0, false, milliseconds(1)});
  });
  while (!place.has_sleepers()) std::this_thread::yield();
  std::this_thread::sleep_for(milliseconds(10));
  stored.store(true, std::memory_order_release);  // and no wake()
  thread.join();
}

TEST(WaitPlace, SeveralThreadsWakeAtOnce) {
  constexpr int kThreads = 6;
  constexpr int kRounds = 500;
  Crowded crowded;
  for (const WaitManner& manner : kManners) {
    WaitPlace place;
    std::vector<std::atomic<int>> done(kThreads);
    std::vector<std::thread> all;
    for (std::atomic<int>& own : done) {
      all.emplace_back([&] {
        for (int round = 1; round <= kRounds; ++round) {
          own.store(round);
          place.wake();
          for (std::atomic<int>& other : done) {
            place.wait([&] { return other.load() >= round; }, manner);
          }
        }
      });
    }
    for (std::thread& thread : all) thread.join();
    for (std::atomic<int>& own : done) EXPECT_EQ(own.load(), kRounds);
  }
}

TEST(WaitPlace, ASleeperWhoseConditionThrowsComesFree) {
  WaitPlace place;
  std::atomic<bool> failed{false};
  std::thread thread([&] {
    auto ready = [&] {
      if (failed.load()) throw std::runtime_error("failed");
      return false;
    };
    EXPECT_THROW(place.wait(ready, {0, 0, false, {}}), std::runtime_error);
  });
  while (!place.has_sleepers()) std::this_thread::yield();
  std::this_thread::sleep_for(milliseconds(10));
  failed.store(true);
  place.wake();
  thread.join();
  EXPECT_FALSE(place.has_sleepers());
}

TEST(WaitPlace, TeamsThatSleepCountTheSame) {
  Crowded crowded;
  for (int size : {2, 5}) {
    ThreadTeam team(size, 1);
    std::atomic<int> sum{0};
    for (int round = 0; round < 200; ++round) {
      team.run([&](TeamMember& member) {
        for (int i = 1; i <= 3; ++i) {
          sum.fetch_add(1);
          member.barrier();
          EXPECT_EQ(sum.load(), (3 * round + i) * size);
          member.barrier();
        }
      });
    }
  }
}

TEST(WaitPlace, AFailureWakesMembersThatSleep) {
  Crowded crowded;
  ThreadTeam team(4);
  for (bool at_barrier : {true, false}) {
    auto fail_late = [&](TeamMember& member) {
      if (member.id() == 3) {
        std::this_thread::sleep_for(milliseconds(20));
        throw std::runtime_error("late");
      }
      if (at_barrier) member.barrier();
      member.wait_until([] { return false; });
    };
    EXPECT_THROW(team.run(fail_late), std::runtime_error);
  }
}

TEST(WaitPlace, RanksThatSleepExchangeAndComeFreeOnAbort) {
  Crowded crowded;
  for (int size : {2, 4}) {
    LocalGroup group(size, 64);
    Ranks ranks = communicators(group);
    run_ranks(ranks, [&](Communicator& comm) {
      for (int i = 0; i < 500; ++i) {
        float value = static_cast<float>(comm.rank() + i);
        comm.all_reduce(&value, 1);
        ASSERT_EQ(value, static_cast<float>(size * i + size * (size - 1) / 2));
      }
    });
    auto last_fails = [&](Communicator& comm) {
      if (comm.rank() == size - 1) {
        std::this_thread::sleep_for(milliseconds(20));
        throw std::runtime_error("late");
      }
      comm.barrier();
    };
    EXPECT_THROW(run_ranks(ranks, last_fails), std::runtime_error);
  }
}

}  // namespace
}  // namespace deinfer

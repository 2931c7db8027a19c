#include "base/short_slices.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "base/thread_team.h"

namespace deinfer {
namespace {

/// The calling thread's slice, ns; 0 where the OS does not say.
unsigned long slice() {
  struct {
    unsigned size, policy;
    unsigned long flags;
    int nice;
    unsigned priority;
    unsigned long runtime, deadline, period;
  } attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return 0;
  return attributes.runtime;
}

TEST(ShortSlices, LastAsLongAsTheOutermost) {
  if (!ShortSlices::known()) GTEST_SKIP();
  unsigned long before = slice();
  {
    ShortSlices outer;
    unsigned long inside = slice();
    EXPECT_EQ(inside, std::min(before, 100'000ul));  // ns, the shortest that Linux grants
    {
      ShortSlices inner;
    }
    EXPECT_EQ(slice(), inside);
  }
  EXPECT_EQ(slice(), before);
}

TEST(ShortSlices, OfATeamLeaveItsCallerAsItWas) {
  unsigned long before = slice();
  WaitPlace::avoid_yields(std::chrono::milliseconds(0));  // otherwise it does not even change
  ThreadTeam team(2);
  team.run([&](TeamMember&) { EXPECT_LE(slice(), before); });
  EXPECT_THROW(team.run([](TeamMember&) { throw std::runtime_error("fails"); }),
               std::runtime_error);
  EXPECT_EQ(slice(), before);
}

}  // namespace
}  // namespace deinfer

#include "base/wait_place.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <limits>

namespace deinfer {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

// Who gets a core by a yield keeps it until the timer looks, every 1 to 4 ms. Ranks that share a
// core yield it to each other for less than that, unless they compute so much that sleeping is
// cheap.
constexpr nanoseconds kLongYield = milliseconds(2);
// Then a yield tries whether others still want the core.
constexpr nanoseconds kAvoidance = milliseconds(100);

}  // namespace

std::atomic<nanoseconds> WaitPlace::avoid_until_{nanoseconds(0)};

nanoseconds WaitPlace::now() { return std::chrono::steady_clock::now().time_since_epoch(); }

void WaitPlace::avoid_yields(nanoseconds time) {
  avoid_until_.store(now() + time, std::memory_order_relaxed);
}

bool WaitPlace::yields_were_long() {
  nanoseconds until = avoid_until_.load(std::memory_order_relaxed);
  return until != nanoseconds(0) && now() < until + std::chrono::seconds(1);
}

nanoseconds WaitPlace::yield(nanoseconds begin) {
  sched_yield();
  nanoseconds end = now();
  if (end - begin >= kLongYield) avoid_yields(kAvoidance);
  return end;
}

void WaitPlace::sleep(std::uint32_t asleep, nanoseconds longest) {
  auto seconds = std::chrono::duration_cast<std::chrono::seconds>(longest);
  timespec limit{seconds.count(), (longest - seconds).count()};
  syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, asleep,
          longest == nanoseconds(0) ? nullptr : &limit, nullptr, 0);
}

void WaitPlace::wake_sleepers() {
  // Where another thread is faster, it wakes those who were asleep before it; who goes to sleep
  // after it sees what this thread has stored.
  std::uint32_t word = word_.load();
  if ((word & kSleepers) == 0 || !word_.compare_exchange_strong(word, word + 1)) return;
  syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr,
          0);
}

}  // namespace deinfer

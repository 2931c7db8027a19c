// Where threads wait for what others do. They spin and then yield; while yields are long, because
// others want the cores, they sleep instead.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace deinfer {

/// What a thread does before it sleeps.
struct WaitManner {
  static constexpr int kSpins = 2000;  // tens of microseconds
  static constexpr int kUnlimited = std::numeric_limits<int>::max();

  int spins = kSpins;
  int yields = kUnlimited;
  bool through_long_yields = false;
  std::chrono::nanoseconds longest_sleep{0};  // then the thread looks by itself; 0: no limit
};

class WaitPlace {
 public:
  /// Returns when ready() holds, which may throw. What it depends on must be stored and loaded with
  /// memory_order_seq_cst: of a thread that stores and then looks for sleepers, and one that says
  /// that it sleeps and then looks again, at least one sees the other. Where such a store would
  /// take too long, memory_order_release will do with a longest_sleep: that is then how much later
  /// a thread may notice what was stored at the moment when it fell asleep.
  template <typename Ready>
  void wait(Ready ready, WaitManner manner = {}) {
    for (int spins = manner.spins; spins > 0; --spins) {
      if (ready()) return;
      __builtin_ia32_pause();
    }
    std::chrono::nanoseconds time = now();
    for (int yields = manner.yields; yields > 0; --yields) {
      if (!manner.through_long_yields && yields_are_long(time)) break;
      if (ready()) return;
      time = yield(time);
    }
    while (!ready()) {
      std::uint32_t asleep = word_.fetch_or(kSleepers) | kSleepers;
      if (ready()) return;
      sleep(asleep, manner.longest_sleep);
    }
  }

  /// To follow every store that may make a ready() true. Without sleepers it only loads.
  void wake() {
    if (has_sleepers()) wake_sleepers();
  }
  bool has_sleepers() const { return (word_.load() & kSleepers) != 0; }

  /// For so long, threads of this process sleep rather than yield. Called after a long yield, and
  /// by tests.
  static void avoid_yields(std::chrono::nanoseconds time);
  /// Whether a yield has been long within about a second.
  static bool yields_were_long();

 private:
  static constexpr std::uint32_t kSleepers = 1;  // the other bits count who woke them

  static std::chrono::nanoseconds now();
  static bool yields_are_long(std::chrono::nanoseconds time) {
    return time < avoid_until_.load(std::memory_order_relaxed);
  }
  /// Returns the time afterwards; `begin` is that before.
  static std::chrono::nanoseconds yield(std::chrono::nanoseconds begin);
  void sleep(std::uint32_t asleep, std::chrono::nanoseconds longest);
  void wake_sleepers();

  static std::atomic<std::chrono::nanoseconds> avoid_until_;

  alignas(64) std::atomic<std::uint32_t> word_{0};
};

}  // namespace deinfer

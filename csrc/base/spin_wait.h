// Waiting for another thread's store: spins, then yields.
#pragma once

#include <sched.h>

namespace deinfer {

class SpinWait {
 public:
  static constexpr int kSpinsBeforeYield = 2000;  // tens of microseconds

  explicit SpinWait(int spins = kSpinsBeforeYield) : spins_(spins) {}
  void once() {
    if (spins_ > 0) {
      --spins_;
      __builtin_ia32_pause();
    } else {
      sched_yield();
    }
  }

 private:
  int spins_;
};

}  // namespace deinfer

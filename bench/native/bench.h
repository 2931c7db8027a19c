// What the functions of libdeinfer_bench share. They have C names for ctypes; one that fails
// returns null or -1 and leaves its message in bench_error().
#pragma once

#include <chrono>
#include <exception>
#include <string>
#include <vector>

#include "base/thread_team.h"
#include "ops/context.h"

#define BENCH_API extern "C" DEINFER_API

namespace deinfer::bench {

/// A thread team with what operations need on each of its threads.
struct Team {
  explicit Team(int threads)
      : kernels(cpu::kernels_for(select_isa())),
        team(threads),
        scratch(static_cast<std::size_t>(threads)) {}

  const cpu::KernelTable& kernels;
  ThreadTeam team;
  std::vector<ThreadScratch> scratch;
  BufferArena weights;  // small matrices have huge pages, as in a model
};

/// The message of the last failure on this thread.
std::string& last_error();

template <typename Result, typename Function>
Result guarded(Result failed, Function&& function) {
  try {
    return function();
  } catch (const std::exception& error) {
    last_error() = error.what();
    return failed;
  }
}

/// Runs step(member, i) for i in [0, count) on the whole team, as the engine does: one run of the
/// team, steps that end in a barrier. nanoseconds[i] is what step i took.
template <typename Step>
void time_steps(ThreadTeam& team, int count, double* nanoseconds, Step&& step) {
  using Clock = std::chrono::steady_clock;
  team.run([&](TeamMember& member) {
    member.barrier();
    Clock::time_point before = Clock::now();
    for (int i = 0; i < count; ++i) {
      step(member, i);
      if (member.id() != 0) continue;
      Clock::time_point now = Clock::now();
      nanoseconds[i] = std::chrono::duration<double, std::nano>(now - before).count();
      before = now;
    }
  });
}

}  // namespace deinfer::bench

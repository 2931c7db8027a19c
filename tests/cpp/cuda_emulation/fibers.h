// The threads of an emulated CUDA grid: fibers of the calling thread, one block after another.
//
// A fiber runs until it waits for its warp or its block. The order in which runnable fibers take
// turns is chosen by set_schedule(): results that depend on it have a data race. Waiting for
// threads that have ended, or that wait elsewhere, is an error: hardware would hang or go wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxThreads = 1024;

/// Runs body() once per thread of the grid. Throws std::runtime_error that says which threads of
/// which block wait where.
void run_grid(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

enum class Schedule { kAscending, kDescending, kShuffled };
/// Of grids that begin from now on, in the whole process.
void set_schedule(Schedule schedule);

/// Waits for all threads of the block. `line` is where it is called: all must call it there.
void sync_block(int line);
/// Waits for all threads of the warp, which all must come to the same call, and gives what lane i
/// passed at offset i * bytes; valid until the thread's next exchange but one. bytes is at most 64.
const std::byte* exchange(const void* value, std::size_t bytes, int line);
/// Dynamic shared memory of the block.
std::byte* dynamic_shared();

}  // namespace emulation

// Of the thread that runs.
extern thread_local emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

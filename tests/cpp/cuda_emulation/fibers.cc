#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the x86-64 System V ABI lets a callee keep, and changes stacks.
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
extern "C" void emulation_switch(void** save, void* load);

thread_local emulation::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kOuterFrames = 4 << 10;  // more than those of Machine::main and leave
#endif
constexpr std::size_t kExchangeBytes = 64;
std::atomic<Schedule> schedule{Schedule::kAscending};

enum class State { kReady, kWarp, kBlock, kEnded };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::kEnded;
  int line = 0;       // where it waits
  int exchanges = 0;  // so far
  Dim3 thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

/// One OS thread's: its grids run one after another.
class Machine {
 public:
  Machine() {
    // Only touched pages take memory.
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    stacks_ = static_cast<std::byte*>(memory);
  }
  ~Machine() {
#if defined(__SANITIZE_ADDRESS__)
    for (int i = 0; i < kMaxThreads; ++i) unpoison(i);  // for whoever gets the memory next
#endif
    munmap(stacks_, kStackBytes * kMaxThreads);
  }

  void run(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
    count_ = static_cast<int>(block.x * block.y * block.z);
    if (count_ < 1 || count_ > kMaxThreads || grid.x * grid.y * grid.z == 0) {
      throw std::runtime_error("emulation: a block of " + std::to_string(count_) + " threads");
    }
    body_ = &body;
    shared_.assign(shared_bytes, std::byte{0xff});
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) run_block({x, y, z}, block);
      }
    }
  }

  void wait(State state, int line) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(current_)];
    fiber.state = state;
    fiber.line = line;
    leave(fiber);
  }
  const std::byte* exchange(const void* value, std::size_t bytes, int line) {
    Fiber& fiber = fibers_[static_cast<std::size_t>(current_)];
    // Two buffers take turns: nobody is two exchanges ahead of another lane.
    auto buffer = static_cast<std::size_t>(fiber.exchanges++ % 2);
    auto warp = static_cast<std::size_t>(current_ / kWarpSize);
    auto lane = static_cast<std::size_t>(current_ % kWarpSize);
    std::byte* memory = exchanges_[warp][buffer].data();
    std::memcpy(memory + lane * bytes, value, bytes);
    wait(State::kWarp, line);
    return memory;
  }
  std::byte* shared() { return shared_.data(); }

 private:
  void run_block(Dim3 index, Dim3 block) {
    for (int i = 0; i < count_; ++i) {
      Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
      auto id = static_cast<unsigned>(i);
      fiber.thread = {id % block.x, id / block.x % block.y, id / block.x / block.y};
      fiber.exchanges = 0;
      prepare(fiber, i);
      fiber.state = State::kReady;
    }
    blockIdx = index;
    std::vector<int> order(static_cast<std::size_t>(count_));
    for (int i = 0; i < count_; ++i) order[static_cast<std::size_t>(i)] = i;
    const Schedule how = schedule.load();
    if (how == Schedule::kDescending) std::reverse(order.begin(), order.end());
    std::mt19937 random(index.x);
    for (int ended = 0; ended < count_;) {
      if (how == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random);
      bool any = false;
      for (int i : order) {
        Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
        if (fiber.state != State::kReady) continue;
        any = true;
        current_ = i;
        threadIdx = fiber.thread;
        enter(fiber, i);
        ended += fiber.state == State::kEnded ? 1 : 0;
      }
      if (ended < count_ && !release() && !any) stuck(index);
    }
  }

  /// Frees warps and the block where all have come.
  bool release() {
    bool any = false;
    for (int first = 0; first < count_; first += kWarpSize) {
      any |= release_range(first, std::min(first + kWarpSize, count_), State::kWarp);
    }
    return release_range(0, count_, State::kBlock) || any;
  }
  bool release_range(int first, int last, State state) {
    const int line = fibers_[static_cast<std::size_t>(first)].line;
    for (int i = first; i < last; ++i) {
      const Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
      if (fiber.state != state || fiber.line != line) return false;
    }
    for (int i = first; i < last; ++i) fibers_[static_cast<std::size_t>(i)].state = State::kReady;
    return true;
  }

  [[noreturn]] void stuck(Dim3 block) const {
    std::string text = "emulation: block " + std::to_string(block.x) + "," +
                       std::to_string(block.y) + "," + std::to_string(block.z) + " is stuck:";
    std::string last;
    for (int i = 0; i < count_; ++i) {
      const Fiber& fiber = fibers_[static_cast<std::size_t>(i)];
      std::string where = fiber.state == State::kEnded
                              ? " has ended"
                              : std::string(fiber.state == State::kWarp ? " waits for its warp"
                                                                        : " waits for its block") +
                                    " in line " + std::to_string(fiber.line);
      if (where != last) text += " thread " + std::to_string(i) + where + ";";
      last = where;
    }
    throw std::runtime_error(text);
  }

  std::byte* stack(int i) { return stacks_ + kStackBytes * static_cast<std::size_t>(i); }

#if defined(__SANITIZE_ADDRESS__)
  /// The frames that thread i never left: all of them only if it was stuck.
  void unpoison(int i) {
    const bool ended = fibers_[static_cast<std::size_t>(i)].state == State::kEnded;
    const std::size_t bytes = ended ? kOuterFrames : kStackBytes;
    __asan_unpoison_memory_region(stack(i) + kStackBytes - bytes, bytes);
  }
#endif

  void prepare(Fiber& fiber, int i) {
#if defined(__SANITIZE_ADDRESS__)
    unpoison(i);
#endif
    auto* top = reinterpret_cast<void**>(stack(i) + kStackBytes);
    *--top = nullptr;                                  // alignment: as after a call
    *--top = reinterpret_cast<void*>(&Machine::main);  // where the switch returns to
    top -= 6;                                          // the saved registers
    std::memset(top, 0, 6 * sizeof(void*));
    fiber.stack_pointer = top;
  }

  static void main();

  void enter(Fiber& fiber, [[maybe_unused]] int i) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack(i), kStackBytes);
#endif
    emulation_switch(&home_, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    const bool ended = fiber.state == State::kEnded;
    __sanitizer_start_switch_fiber(ended ? nullptr : &fiber.fake_stack, home_stack_, home_bytes_);
#endif
    emulation_switch(&fiber.stack_pointer, home_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &home_stack_, &home_bytes_);
#endif
  }

  std::array<Fiber, kMaxThreads> fibers_;
  std::array<std::array<std::array<std::byte, kExchangeBytes * kWarpSize>, 2>,
             kMaxThreads / kWarpSize>
      exchanges_;
  std::byte* stacks_ = nullptr;
  std::vector<std::byte> shared_;
  const std::function<void()>* body_ = nullptr;
  void* home_ = nullptr;
  int count_ = 0;
  int current_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* home_stack_ = nullptr;
  std::size_t home_bytes_ = 0;
#endif
};

Machine& machine() {
  thread_local std::unique_ptr<Machine> own = std::make_unique<Machine>();
  return *own;
}

void Machine::main() {
  Machine& self = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.home_stack_, &self.home_bytes_);
#endif
  (*self.body_)();
  Fiber& fiber = self.fibers_[static_cast<std::size_t>(self.current_)];
  fiber.state = State::kEnded;
  self.leave(fiber);
  std::abort();  // nobody enters an ended fiber
}

}  // namespace

void set_schedule(Schedule how) { schedule = how; }

void run_grid(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  machine().run(grid, block, shared_bytes, body);
}

void sync_block(int line) { machine().wait(State::kBlock, line); }

const std::byte* exchange(const void* value, std::size_t bytes, int line) {
  return machine().exchange(value, bytes, line);
}

std::byte* dynamic_shared() { return machine().shared(); }

}  // namespace emulation
